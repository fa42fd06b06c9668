"""Compile a MoE layer of one's own: sorted tokens split by expert, a shared expert beside them.

    python examples/custom_moe.py

No base class, no registration, no names that moec knows: it watches what the layer computes. The example prints the
report, compares the results, shows that the compiled layer reads the live weights, and puts the original back.
`moec bench examples/custom_moe.py:build` measures it, `moec inspect examples/custom_moe.py:build` tells what was found.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moec


class GatedFFN(nn.Module):
    """x[N, D] -> [N, D]: the expert that every token visits."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w_in = nn.Linear(dim, 2 * hidden, bias=False)
        self.w_out = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w_in(x).chunk(2, dim=-1)
        out: Tensor = self.w_out(F.silu(gate) * up)
        return out


class SharedExpertMoE(nn.Module):
    """x[B, S, D] -> [B, S, D]: top-k of E experts with stacked weights, plus one gated expert that sees every token."""

    def __init__(self, dim: int = 128, hidden: int = 256, num_experts: int = 16, top_k: int = 4) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(dim, num_experts, bias=False)
        self.w_in = nn.Parameter(torch.randn(num_experts, 2 * hidden, dim) * dim**-0.5)
        self.w_out = nn.Parameter(torch.randn(num_experts, dim, hidden) * hidden**-0.5)
        self.shared = GatedFFN(dim, hidden)
        self.shared_gate = nn.Linear(dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        scores, chosen = self.gate(tokens).sigmoid().topk(self.top_k, dim=-1)
        scores = scores / scores.sum(dim=-1, keepdim=True)

        slots = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=len(self.w_in)).tolist()
        segments = tokens[slots // self.top_k].split(counts)
        outputs = [self.expert(rows, self.w_in[e], self.w_out[e]) for e, rows in enumerate(segments)]
        routed = torch.empty(len(slots), tokens.shape[-1], dtype=x.dtype, device=x.device)
        routed[slots] = torch.cat(outputs)
        mixed = (routed.unflatten(0, (-1, self.top_k)) * scores.unsqueeze(-1)).sum(dim=1)

        return (mixed + self.shared_gate(tokens).sigmoid() * self.shared(tokens)).reshape(x.shape)

    @staticmethod
    def expert(rows: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        """rows[N, D], w_in[2F, D], w_out[D, F] -> [N, D]."""
        gate, up = F.linear(rows, w_in).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, w_out)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(128)
        self.moe = SharedExpertMoE()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.moe(self.norm(x))
        return out


def build() -> tuple[nn.Sequential, Callable[[int], Tensor]]:
    """Two such layers, and inputs for them: what `moec bench examples/custom_moe.py:build` needs."""
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block()).eval(), lambda tokens: torch.randn(1, tokens, 128)


@torch.no_grad()
def main() -> int:
    model, make_inputs = build()
    x = make_inputs(128)
    before = model(x)

    fast = moec.compile(model, example_inputs=(x,), strict=True)
    print(fast.moec.report)
    after = fast(x)
    print(f"\nerror of the whole model: {float((after - before).norm() / before.norm()):.1e}")
    assert torch.allclose(after, before, rtol=1e-4, atol=1e-5)

    # The weights are shared, not copied: what an optimiser writes is what the compiled layer uses.
    model[0].moe.w_out.mul_(2)
    assert torch.allclose(fast(x), model(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(fast(x), before, rtol=1e-2, atol=1e-2)
    print("a change of the weights reaches the compiled model")

    restored = moec.restore(fast)
    assert torch.equal(restored(x), model(x))
    print("restore() gives the original forward back, to the last bit")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
