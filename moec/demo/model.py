"""A small vision transformer for 8x8 digits whose FFNs are MoE layers, written as one writes such a model without moec.

B images, S patches of an image, T = B*S tokens, D model width, E experts, K experts per token, F expert width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Expert(nn.Module):
    """A gated FFN: x[N, D] -> [N, D]."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class MoE(nn.Module):
    """Each token goes to its top_k experts: x[B, S, D] -> [B, S, D].

    In training `aux_loss` holds the load-balancing loss of the last forward; in eval nothing is stored.
    """

    def __init__(self, dim: int, hidden: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.top_k = top_k
        self.router = nn.Linear(dim, num_experts, bias=False)
        self.experts = nn.ModuleList(Expert(dim, hidden) for _ in range(num_experts))
        self.aux_loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        probs = self.router(tokens).softmax(dim=-1)
        weights, chosen = probs.topk(self.top_k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        if self.training:
            self.aux_loss = self.load_balancing_loss(probs, chosen)

        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == index)
            out.index_add_(0, token, expert(tokens[token]) * weights[token, slot, None])
        return out.reshape(x.shape)

    def load_balancing_loss(self, probs: Tensor, chosen: Tensor) -> Tensor:
        """probs[T, E], chosen[T, K] -> scalar, 1 when every expert gets the same share of tokens and probability."""
        share = F.one_hot(chosen, self.num_experts).float().mean(dim=(0, 1))
        return self.num_experts * (share * probs.mean(dim=0)).sum()


class Attention(nn.Module):
    """Multi-head self-attention: x[B, S, D] -> [B, S, D]."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(-2))
        return out


class Block(nn.Module):
    """Attention and MoE, each behind a norm and a residual: x[B, S, D] -> [B, S, D]."""

    def __init__(self, dim: int, num_heads: int, hidden: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.moe = MoE(dim, hidden, num_experts, top_k)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.moe(self.norm2(x))
        return out


class DigitsMoE(nn.Module):
    """images[B, 8, 8] f32 in 0..1 -> logits[B, 10]: 2x2 patches, transformer blocks, mean over the patches."""

    def __init__(
        self,
        *,
        dim: int = 64,
        num_blocks: int = 2,
        num_heads: int = 4,
        hidden: int = 128,
        num_experts: int = 8,
        top_k: int = 2,
    ) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, dim, kernel_size=2, stride=2)
        self.position = nn.Parameter(torch.randn(16, dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim, num_heads, hidden, num_experts, top_k) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images.unsqueeze(1)).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x).mean(dim=1))
        return logits
