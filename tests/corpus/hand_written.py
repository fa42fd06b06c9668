"""Self-contained MoE blocks, each written in one go the way different people write them.

T tokens, D model width, K experts a token, E experts, F expert width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.corpus.blocks import GeluMlp, Swiglu
from tests.corpus.case import case


@case("written.one_hot_mask", expect="compiled")
class OneHotMask(nn.Module):
    """A one-hot mask permuted to [E, K, T], only hit experts visited, integers from `.item()`-like indexing."""

    dim = 20

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(20, 7, bias=False)
        self.experts = nn.ModuleList([Swiglu(20, 12) for _ in range(7)])

    def forward(self, hidden: Tensor) -> Tensor:
        shape = hidden.shape
        hidden = hidden.reshape(-1, shape[-1])
        probability = F.softmax(self.gate(hidden), dim=1, dtype=torch.float)
        probability, chosen = torch.topk(probability, 3, dim=-1)
        probability /= probability.sum(dim=-1, keepdim=True)
        result = torch.zeros_like(hidden)
        mask = F.one_hot(chosen, num_classes=7).permute(2, 1, 0)
        for hit in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            slot, token = torch.where(mask[hit].squeeze(0))
            state = hidden[None, token].reshape(-1, shape[-1])
            state = self.experts[int(hit)](state) * probability[token, slot, None]
            result.index_add_(0, token, state.to(hidden.dtype))
        return result.reshape(shape)


@case("written.segments", expect="compiled", others=1)
class Segments(nn.Module):
    """Counts by scatter, a sort, a Python loop over start offsets, `cat`, un-sort, weights in the end."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(9, 16))
        self.experts = nn.ModuleList([Swiglu(16, 10) for _ in range(9)])
        self.shared = Swiglu(16, 14)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        flat = x.view(-1, 16)
        weights, ids = F.linear(flat, self.gate).softmax(-1).topk(4, sorted=False)
        counts = ids.new_zeros((ids.shape[0], 9))
        counts.scatter_(1, ids, 1)
        per_expert = counts.sum(dim=0).tolist()
        order = ids.view(-1).argsort()
        rows = flat[order // ids.shape[1]]
        outputs, start = [], 0
        for e, count in enumerate(per_expert):
            end = start + count
            if count == 0:
                continue
            outputs.append(self.experts[e](rows[start:end]))
            start = end
        done = torch.cat(outputs, dim=0) if outputs else rows.new_empty(0)
        unsorted = torch.empty_like(done)
        unsorted[order] = done
        mixed = unsorted.view(*ids.shape, -1).mul_(weights.unsqueeze(-1)).sum(dim=1)
        out: Tensor = mixed.view(*x.shape) + self.shared(identity)
        return out


@case("written.weights_by_index", expect="compiled", layout="td")
class WeightsByIndex(nn.Module):
    """The picked experts' weights by fancy index, one einsum a projection, stored [E, F, D] and [E, D, F]."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 6)
        self.up = nn.Parameter(torch.empty(6, 28, 16))
        self.gated = nn.Parameter(torch.empty(6, 28, 16))
        self.down = nn.Parameter(torch.empty(6, 16, 28))

    def forward(self, x: Tensor) -> Tensor:
        score, index = torch.topk(F.softmax(self.router(x), dim=-1), 2, dim=-1)
        score /= score.sum(dim=-1, keepdim=True)
        one = F.silu(torch.einsum("ti,taoi->tao", x, self.gated[index]))
        two = torch.einsum("ti,taoi->tao", x, self.up[index])
        each = torch.einsum("tao,taio->tai", one * two, self.down[index])
        return torch.einsum("tai,ta->ti", each, score)


@case("written.transposed_fused", expect="compiled")
class TransposedFused(nn.Module):
    """Gate and up fused and stored [E, D, 2F], down [E, F, D], biases everywhere, GELU-tanh gate second."""

    dim = 12

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(12, 5)
        self.w_in = nn.Parameter(torch.empty(5, 12, 40))
        self.b_in = nn.Parameter(torch.empty(5, 40))
        self.w_out = nn.Parameter(torch.empty(5, 20, 12))
        self.b_out = nn.Parameter(torch.empty(5, 12))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 12)
        top, ids = self.router(flat).topk(2)
        weights = top.softmax(-1)
        out = flat.new_zeros(flat.shape)
        for e in ids.unique().tolist():
            token, slot = torch.where(ids == e)
            up, gate = (flat[token] @ self.w_in[e] + self.b_in[e]).chunk(2, dim=-1)
            rows = (up * F.gelu(gate, approximate="tanh")) @ self.w_out[e] + self.b_out[e]
            out.index_add_(0, token, rows * weights[token, slot][:, None])
        return out.view(x.shape)


@case("written.interleaved_clamped", expect="compiled")
class InterleavedClamped(nn.Module):
    """Gate and up interleaved, gate clamped above and up on both sides at 7, up + 1, a swish of slope 1.702."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 8)
        self.w_in = nn.Parameter(torch.empty(8, 16, 36))
        self.b_in = nn.Parameter(torch.empty(8, 36))
        self.w_out = nn.Parameter(torch.empty(8, 18, 16))
        self.b_out = nn.Parameter(torch.empty(8, 16))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 16)
        top, ids = self.router(flat).topk(4)
        weights = top.softmax(-1)
        out = torch.zeros_like(flat)
        for e in range(8):
            token, slot = torch.where(ids == e)
            if len(token) == 0:
                continue
            h = flat[token] @ self.w_in[e] + self.b_in[e]
            gate, up = h[..., ::2].clamp(max=7.0), h[..., 1::2].clamp(min=-7.0, max=7.0)
            rows = ((up + 1) * gate * torch.sigmoid(gate * 1.702)) @ self.w_out[e] + self.b_out[e]
            out.index_add_(0, token, weights[token, slot, None] * rows)
        return out.view_as(x)


@case("written.flat_pack", expect="compiled")
class FlatPack(nn.Module):
    """All experts in 2-D parameters [E*F, D]; the second one is used untransposed."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.hidden = 6, 10
        self.router = nn.Linear(16, 6, bias=False)
        self.w1 = nn.Parameter(torch.empty(60, 16))
        self.v1 = nn.Parameter(torch.empty(60, 16))
        self.w2 = nn.Parameter(torch.empty(60, 16))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 16)
        weights, ids = self.router(flat).softmax(-1).topk(2)
        weights = weights / weights.norm(p=1, dim=-1, keepdim=True)
        out = torch.zeros_like(flat)
        w1, v1, w2 = (w.view(self.experts, self.hidden, 16) for w in (self.w1, self.v1, self.w2))
        for e in range(self.experts):
            slot, token = torch.where((ids == e).T)
            if token.numel() == 0:
                continue
            rows = flat[token]
            rows = (F.silu(rows @ w1[e].T) * (rows @ v1[e].T)) @ w2[e]
            out.index_add_(0, token, rows * weights[token, slot, None])
        return out.reshape(x.shape)


@case("written.boolean_mask", expect="compiled")
class BooleanMask(nn.Module):
    """Rows by boolean mask, the weight summed out of a masked [T, K], written back with `out[mask] +=`."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 4)
        self.experts = nn.ModuleList(GeluMlp(16, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.size(-1))
        weights, ids = torch.topk(self.gate(flat).softmax(-1), 2)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            hit = ids == e
            mask = hit.any(dim=-1)
            if mask.any():
                share = (weights * hit).sum(-1)[mask]
                out[mask] += share.unsqueeze(1) * expert(flat[mask])
        return out.reshape_as(x)


@case("written.top1_argmax", expect="compiled")
class Top1Argmax(nn.Module):
    """Top-1 by max and argmax, the probability scales the result, unhit rows written by index assignment."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.switch = nn.Linear(16, 5)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 16)
        probability, route = self.switch(flat).softmax(-1).max(dim=-1)
        where = [torch.eq(route, e).nonzero(as_tuple=True)[0] for e in range(5)]
        out = flat.new_zeros(flat.shape)
        for e in range(5):
            out[where[e], :] = self.experts[e](flat[where[e], :])
        result: Tensor = (out * probability.view(-1, 1)).view(x.shape)
        return result


@case("written.stack_all_gather", expect="either")
class StackAllGather(nn.Module):
    """Every expert on every token, stacked, then the picked ones gathered: wasteful but a true mixture."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 6)
        self.experts = nn.ModuleList(GeluMlp(16, 12) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).topk(2, dim=-1)
        every = torch.stack([expert(x) for expert in self.experts], dim=-2)
        picked = every.gather(-2, ids.unsqueeze(-1).expand(*ids.shape, x.shape[-1]))
        result: Tensor = (weights.softmax(-1).unsqueeze(-1) * picked).sum(-2)
        return result


@case("written.dense_mixture", expect="either")
class DenseMixture(nn.Module):
    """No selection at all: the softmax mixes all experts (K = E)."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 16)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-1)
        return torch.einsum("...de,...e->...d", outputs, self.gate(x).softmax(-1))


@case("written.token_by_token", expect="either", long=False)
class TokenByToken(nn.Module):
    """A Python loop over tokens and slots with `.item()`."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 4)
        self.experts = nn.ModuleList(Swiglu(16, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 16)
        weights, ids = self.gate(flat).softmax(-1).topk(2)
        rows = []
        for t in range(flat.shape[0]):
            picked = [weights[t, k] * self.experts[int(ids[t, k].item())](flat[t]) for k in range(2)]
            rows.append(picked[0] + picked[1])
        return torch.stack(rows).view(x.shape)
