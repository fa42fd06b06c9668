"""Adversarial batch effects: a token's result depends on the other tokens, on their number, or on the calls before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.corpus.blocks import Gathered, LoopList, LoopStacked, Sorted, naive
from tests.corpus.case import case
from tests.corpus.weights import sum_weighted


def _uncapped(m: Any, x: Tensor) -> Tensor:
    rows = x.reshape(-1, m.dim)
    return sum_weighted(m, rows, *m.route(rows)).view_as(x)


class Capacity(LoopList):
    """An expert takes its first `factor * T * K / E` slots in arrival order; later ones are dropped."""

    factor = 1.0
    least = 1

    def mix(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        capacity = max(self.least, int(self.factor * ids.numel() / self.num_experts))
        hits = F.one_hot(ids.flatten(), self.num_experts)
        arrival = (hits.cumsum(0) * hits).sum(-1).view_as(ids)
        weights = weights * (arrival <= capacity)
        return super().mix(x, weights, ids)


@case("batch.capacity_tight", decoy=_uncapped)
class CapacityTight(Capacity):
    """Capacity factor 0.75: some tokens are always dropped."""

    factor = 0.75


@case("batch.capacity_rare", decoy=_uncapped, decoy_tokens=300)
class CapacityRare(Capacity):
    """At least 48 slots an expert: nothing is dropped in a short batch, a lot in a long one."""

    factor = 0.5
    least = 48


@case("batch.capacity_one_hot", decoy=_uncapped, decoy_tokens=130)
class CapacityOneHot(LoopStacked):
    """Dispatch and combine as einsums over a one-hot [T, E, C]; what does not fit is dropped."""

    def mix(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        capacity = 1 + int(1.25 * ids.numel() / self.num_experts)
        hits = F.one_hot(ids.T.flatten(), self.num_experts)  # slot-major: all first picks arrive before second ones
        arrival = ((hits.cumsum(0) - 1) * hits).sum(-1).view_as(ids.T).T
        fits = (arrival < capacity).to(x.dtype)
        place = F.one_hot(arrival.clamp(max=capacity - 1), capacity).to(x.dtype) * fits[..., None]
        expert = F.one_hot(ids, self.num_experts).to(x.dtype)
        dispatch = torch.einsum("tke,tkc->tec", expert, place)
        combine = torch.einsum("tke,tkc,tk->tec", expert, place, weights)
        rows = torch.einsum("tec,td->ecd", dispatch, x.nan_to_num())
        h = F.silu(rows @ self.w1.transpose(1, 2)) * (rows @ self.w3.transpose(1, 2))
        return torch.einsum("tec,ecd->td", combine, h @ self.w2.transpose(1, 2))


@case("batch.capacity_per_sequence", decoy=_uncapped)
class CapacityPerSequence(LoopList):
    """Capacity 2 for each sequence and expert: the layout of the batch decides who is dropped."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        hits = F.one_hot(ids, self.num_experts).sum(-2)
        arrival = hits.cumsum(-2).gather(-1, ids)
        weights = weights * (arrival <= 2)
        return self.mix(x.reshape(-1, self.dim), weights.flatten(0, -2), ids.flatten(0, -2)).view_as(x)


@case("batch.expert_choice", decoy=naive)
class ExpertChoice(LoopList):
    """Experts pick tokens: each takes its top ceil(T K / E) of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.dim)
        count = -(-rows.shape[0] * self.top_k // self.num_experts)
        scores, tokens = self.router(rows).softmax(-1).T.topk(count, dim=-1)
        out = torch.zeros_like(rows)
        for e in range(self.num_experts):
            out.index_add_(0, tokens[e], scores[e, :, None] * self.expert(e, rows[tokens[e]]))
        return out.view_as(x)


@case("batch.sequence_mean", decoy=naive)
class SequenceMean(LoopList):
    """All tokens of a sequence are routed by the sequence's mean."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x.mean(1))
        tokens = x.shape[1]
        weights, ids = weights.repeat_interleave(tokens, 0), ids.repeat_interleave(tokens, 0)
        return self.mix(x.reshape(-1, self.dim), weights, ids).view_as(x)


@case("batch.causal_mean", decoy=naive)
class CausalMean(Sorted):
    """Token s is routed by the mean of tokens 0..s."""

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)
        seen = x.cumsum(1) / steps[:, None]
        weights, ids = self.route(seen.reshape(-1, self.dim))
        return self.mix(x.reshape(-1, self.dim), weights, ids).view_as(x)


@case("batch.soft_moe")
class SoftMoe(nn.Module):
    """Soft MoE: slots are weighted averages of tokens, tokens weighted averages of slots; no routing at all."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Parameter(torch.empty(16, 4, 3))
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 20), nn.GELU(), nn.Linear(20, 16)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.einsum("bsd,dep->bsep", x, self.phi)
        slots = torch.einsum("bsep,bsd->bepd", logits.softmax(1), x)
        done = torch.stack([expert(slots[:, e]) for e, expert in enumerate(self.experts)], 1)
        return torch.einsum("bsep,bepd->bsd", logits.flatten(2).softmax(-1).view_as(logits), done)


@case("batch.other_path_small")
class OtherPathSmall(Gathered):
    """Up to 4 tokens gather weights, longer batches loop over experts: the same function in two ways."""

    def mix(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        if x.shape[0] <= 4:
            return super().mix(x, weights, ids)
        return sum_weighted(self, x, weights, ids)

    def expert(self, e: int, rows: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(rows, self.w1[e])) * F.linear(rows, self.w3[e]), self.w2[e])


DAMPED_FROM = 200


def damped(y: Tensor) -> Tensor:
    """A helper outside of the block that looks at the number of tokens."""
    return y * 0.5 if y.shape[0] > DAMPED_FROM else y


@case("batch.helper_looks_at_length", decoy=_uncapped, decoy_tokens=300)
class HelperLooksAtLength(LoopStacked):
    """More than 200 tokens are damped, by a function outside of the class and a constant outside of the function."""

    def mix(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return damped(super().mix(x, weights, ids))


class OtherFormula(LoopStacked):
    """Another activation for batches of more than `limit` tokens; nothing is written down about it."""

    limit = 64

    def is_other(self, count: int) -> bool:
        return count > self.limit

    def mix(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        act = F.gelu if self.is_other(x.shape[0]) else F.silu
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            token, slot = torch.where(ids == e)
            rows = x[token]
            h = act(F.linear(rows, self.w1[e])) * F.linear(rows, self.w3[e])
            out.index_add_(0, token, F.linear(h, self.w2[e]) * weights[token, slot, None])
        return out


def _short_formula(m: Any, x: Tensor) -> Tensor:
    rows = x.reshape(-1, m.dim)
    weights, ids = m.route(rows)
    out = torch.zeros_like(rows)
    for e in range(m.num_experts):
        token, slot = torch.where(ids == e)
        out.index_add_(0, token, LoopStacked.expert(m, e, rows[token]) * weights[token, slot, None])
    return out.view_as(x)


def _always_two(m: Any, x: Tensor) -> Tensor:
    rows = x.reshape(-1, m.dim)
    return sum_weighted(m, rows, *m.router(rows).softmax(-1).topk(m.top_k)).view_as(x)


@case("batch.other_formula_long", expect="left alone", decoy=_short_formula, decoy_tokens=130)
class OtherFormulaLong(OtherFormula):
    """SiLU up to 64 tokens, GELU beyond."""


@case("batch.other_formula_very_long", decoy=_short_formula, decoy_tokens=300)
class OtherFormulaVeryLong(OtherFormula):
    """SiLU up to 256 tokens, GELU beyond: past the lengths a quick check would try."""

    limit = 256


@case("batch.other_formula_single", expect="left alone", decoy=_short_formula, decoy_tokens=1)
class OtherFormulaSingle(OtherFormula):
    """One token alone (decoding) is computed by another formula."""

    def is_other(self, count: int) -> bool:
        return count == 1


@case("batch.top_k_by_length", decoy=_always_two, decoy_tokens=130)
class TopKByLength(LoopStacked):
    """Two experts a token in short batches, one in batches of more than 100 tokens."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.router(x).softmax(-1).topk(self.top_k)
        if x.shape[0] > 100:
            weights = weights * torch.tensor([1.0, 0.0], dtype=x.dtype, device=x.device)
        return weights, ids


@case("batch.call_counter", inline_expect="left alone", stateful=True)
class CallCounter(LoopList):
    """Every third call swaps the two picked experts' weights: a counter decides."""

    def build_router(self) -> None:
        super().build_router()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        rows = x.reshape(-1, self.dim)
        weights, ids = self.route(rows)
        if self.calls % 3 == 0:
            weights = weights.flip(-1)
        return self.mix(rows, weights, ids).view_as(x)


@case("batch.call_counter_buffer", stateful=True)
class CallCounterBuffer(LoopStacked):
    """A step buffer anneals the temperature from call to call."""

    step: Tensor

    def build_router(self) -> None:
        super().build_router()
        self.register_buffer("step", torch.zeros(()))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.step += 1
        top, ids = self.router(x).topk(self.top_k)
        return (top * (1 + self.step / 10)).softmax(-1), ids


@case("batch.remembers_last", stateful=True)
class RemembersLast(LoopList):
    """Routing logits are smoothed with those of the previous call's mean."""

    def build_router(self) -> None:
        super().build_router()
        self.last: Tensor | None = None

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.router(x)
        if self.last is not None:
            logits = logits + self.last
        self.last = logits.detach().mean(0).nan_to_num()
        top, ids = logits.topk(self.top_k)
        return top.softmax(-1), ids
