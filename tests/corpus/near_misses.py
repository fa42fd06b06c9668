"""Near misses: blocks that look like a mixture to a careless reader and are something else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.corpus.blocks import DenseAll, Gathered, LoopList, LoopStacked, Sorted, naive
from tests.corpus.case import case
from tests.corpus.experts import GeluExperts

RANDOM = ("random", "RNG", "rng", "determinis")


@case("near.random_selection", inline_expect="left alone", random=True, reason=RANDOM, decoy=naive)
class RandomSelection(LoopList):
    """Experts drawn by multinomial, in eval too."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        probability = self.router(x).softmax(-1).nan_to_num(1.0)
        ids = torch.multinomial(probability, self.top_k)
        return probability.gather(1, ids), ids


@case("near.gumbel", inline_expect="left alone", random=True, reason=RANDOM, decoy=naive)
class Gumbel(Sorted):
    """Gumbel noise on the logits, in eval too."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.router(x)
        noise = -torch.log(-torch.log(torch.rand_like(logits) + 1e-9) + 1e-9)
        top, ids = (logits + noise).topk(self.top_k)
        return top.softmax(-1), ids


def _top2(m: Any, x: Tensor) -> Tensor:
    rows = x.reshape(-1, m.dim)
    weights, ids = m.route(rows)
    return LoopList.mix(m, rows, weights, ids).view_as(x)


@case("near.top1_of_top2", decoy=_top2)
class Top1OfTop2(LoopList):
    """Top-2 is computed and renormalised, but only the first expert runs, unweighted."""

    def mix(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            token = torch.where(ids[:, 0] == e)[0]
            if token.numel():
                out[token] = self.expert(e, x[token])
        return out

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.dim)
        return self.mix(rows, *self.route(rows)).view_as(x)


@case("near.softmax_over_batch", decoy=naive)
class SoftmaxOverBatch(LoopList):
    """The gate is normalised over tokens instead of experts (dim=0)."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.router(x).softmax(0).topk(self.top_k)
        return weights, ids


def _expanded(m: Any, x: Tensor) -> Tensor:
    rows = x.reshape(-1, m.dim)
    weights, ids = m.route(rows)
    every = torch.stack([m.expert(e, rows) for e in range(m.num_experts)], 1)
    picked = every.gather(1, ids[..., None].expand(-1, -1, m.dim))
    result: Tensor = (picked * weights[..., None]).sum(1).view_as(x)
    return result


@case("near.forgotten_expand", decoy=_expanded)
class ForgottenExpand(LoopList):
    """`gather` without `.expand()`: only feature 0 of the picked expert arrives, broadcast over all features."""

    def mix(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        every = torch.stack([self.expert(e, x) for e in range(self.num_experts)], 1)
        picked = every.gather(1, ids[..., None])
        return (picked * weights[..., None]).sum(1) + torch.zeros_like(x)


def _logits_mixed(m: Any, x: Tensor) -> Tensor:
    rows = x.reshape(-1, m.dim)
    weights, ids = m.route(rows)
    out = torch.zeros_like(rows)
    for e in range(m.num_experts):
        token, slot = torch.where(ids == e)
        out.index_add_(0, token, m.experts[e][:3](rows[token]) * weights[token, slot, None])
    return out.softmax(-1).view_as(x)


@case("near.softmax_experts", decoy=_logits_mixed)
class SoftmaxExperts(LoopList):
    """Experts end in a softmax: distributions are mixed, not logits."""

    def build_experts(self) -> None:
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 16), nn.Softmax(-1))
            for _ in range(self.num_experts)
        )


def _not_special(m: Any, x: Tensor) -> Tensor:
    rows = x.reshape(-1, m.dim)
    weights, ids = m.route(rows)
    out = torch.zeros_like(rows)
    for e in range(m.num_experts):
        token, slot = torch.where(ids == e)
        out.index_add_(0, token, LoopStacked.expert(m, e, rows[token]) * weights[token, slot, None])
    return out.view_as(x)


@case("near.special_index", decoy=_not_special)
class SpecialIndex(LoopStacked):
    """The index is special-cased in Python: expert 3 is negated, with nothing in its parameters to show it."""

    def expert(self, e: int, rows: Tensor) -> Tensor:
        y = super().expert(e, rows)
        if e == 3:
            y = -y
        return y


@case("near.special_rare_index", decoy=_not_special, decoy_tokens=3000)
class SpecialRareIndex(SpecialIndex):
    """As above, and expert 3 is picked by fewer than one token in a hundred."""

    def build_router(self) -> None:
        self.router = nn.Linear(self.dim, self.num_experts)

    def fill_(self, generator: torch.Generator) -> None:
        self.router.bias[3] = -4.5


@case("near.special_very_rare_index", decoy=_not_special, decoy_tokens=6000)
class SpecialVeryRareIndex(SpecialIndex):
    """As above with unit weights, and picked by about one token in five hundred: seen at work, rarely judged."""

    def __init__(self) -> None:
        super().__init__(top_k=1, body="relu")

    def build_router(self) -> None:
        self.router = nn.Linear(self.dim, self.num_experts)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        top, ids = self.router(x).topk(1)
        return torch.ones_like(top), ids

    def fill_(self, generator: torch.Generator) -> None:
        self.router.bias[3] = -3.6


@case("near.special_submodule")
class SpecialSubmodule(GeluExperts):
    """The last expert of the list is asked for its result twice as strongly (`e == len(experts) - 1`)."""

    def mix(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            share = weights[token, slot, None]
            if e == len(self.experts) - 1:
                share = share * 2
            out.index_add_(0, token, expert(x[token]) * share)
        return out


@case("near.slot_scale", decoy=naive)
class SlotScale(Gathered):
    """Slot 1 counts half: the weight depends on the slot, not only on the expert."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(x)
        return weights * torch.tensor([1.0, 0.5], dtype=x.dtype, device=x.device), ids


def _one_body(m: Any, x: Tensor) -> Tensor:
    rows = x.reshape(-1, m.dim)
    return Gathered.mix(m, rows, *m.route(rows)).view_as(x)


@case("near.slot_body", decoy=_one_body)
class SlotBody(Gathered):
    """The second pick goes through ReLU instead of SiLU: the body depends on the slot."""

    def mix(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        first = Gathered.mix(self, x, weights[:, :1], ids[:, :1])
        h = torch.einsum("td,tkfd->tkf", x, self.w1[ids[:, 1:]])
        h = F.relu(h) * torch.einsum("td,tkfd->tkf", x, self.w3[ids[:, 1:]])
        return first + torch.einsum("tkf,tkdf,tk->td", h, self.w2[ids[:, 1:]], weights[:, 1:])


def _raw_tokens(m: Any, x: Tensor) -> Tensor:
    rows = x.reshape(-1, m.dim)
    return DenseAll.mix(m, rows, *m.route(rows)).view_as(x)


@case("near.two_inputs", decoy=_raw_tokens)
class RouterSeesOther(DenseAll):
    """Experts see the normalised tokens, the router the raw ones."""

    def build_experts(self) -> None:
        super().build_experts()
        self.norm = nn.LayerNorm(self.dim)

    def mix(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return super().mix(self.norm(x), weights, ids)


@case("near.previous_token")
class PreviousToken(LoopList):
    """Experts see the token before (a causal shift): mixing is not per token, the experts are."""

    def forward(self, x: Tensor) -> Tensor:
        shifted = F.pad(x, (0, 0, 1, 0))[:, :-1]
        weights, ids = self.route(x.reshape(-1, self.dim))
        return self.mix(shifted.reshape(-1, self.dim), weights, ids).view_as(x)


@case("near.value_branch", decoy=naive, decoy_scale=60.0)
class ValueBranch(LoopList):
    """A Python branch on the data: when some |x| exceeds 100 the weights are all equal."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(x)
        if x.abs().max() > 100:
            weights = torch.full_like(weights, 0.5)
        return weights, ids


@case("near.load_branch")
class LoadBranch(LoopList):
    """A Python branch on the routing: when one expert gets more than 40 slots, everything is damped."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.dim)
        weights, ids = self.route(rows)
        y = self.mix(rows, weights, ids)
        if torch.bincount(ids.flatten()).max() > 40:
            y = y * 0.5
        return y.view_as(x)


@case("near.confidence_branch")
class ConfidenceBranch(LoopStacked):
    """A Python branch on the weights: when no token is unsure, they are rounded to halves."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(x)
        if weights.amax(-1).min() > 0.9:
            weights = (weights * 2).round() / 2
        return weights, ids


@case("near.zero_branch")
class ZeroBranch(LoopList):
    """An all-zero batch is answered with ones by an early return."""

    def forward(self, x: Tensor) -> Tensor:
        if not x.any():
            return torch.ones_like(x)
        out: Tensor = super().forward(x)
        return out


@case("near.low_precision_experts", decoy=_not_special)
class LowPrecisionExperts(LoopStacked):
    """Experts compute in bfloat16 inside a float32 model: doing better is still a different result."""

    def expert(self, e: int, rows: Tensor) -> Tensor:
        low = rows.bfloat16()
        h = F.silu(F.linear(low, self.w1[e].bfloat16())) * F.linear(low, self.w3[e].bfloat16())
        return F.linear(h, self.w2[e].bfloat16()).to(rows.dtype)
