"""Routers with a capacity, in the ways in which people write them, and near misses of those.

T tokens, B sequences, S tokens a sequence, D model width, E experts, K experts a token, C places of an expert.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.corpus.blocks import GeluMlp
from tests.corpus.case import case
from tests.corpus.placed import Placed


class Gate(nn.Module):
    """x[T, D] -> dispatch and combine [T, E, C]. First choices before second ones, which renormalize before drops."""

    factor = 1.25
    least = 1

    def __init__(self, dim: int = 16, num_experts: int = 4, k: int = 2) -> None:
        super().__init__()
        self.k, self.num_experts = k, num_experts
        self.wg = nn.Linear(dim, num_experts, bias=False)

    def capacity(self, tokens: int) -> int:
        return max(self.least, math.ceil(self.k * tokens / self.num_experts * self.factor))

    def scores(self, x: Tensor) -> Tensor:
        scores: Tensor = self.wg(x).softmax(-1)
        return scores

    def weigh(self, weights: Tensor) -> Tensor:
        return weights / weights.sum(-1, keepdim=True)

    def arrivals(self, hits: Tensor, weights: Tensor) -> Tensor:
        """hits [T, K, E] of 0 and 1 -> [T, K, E]: how many slots come before each one at its expert."""
        by_choice = hits.transpose(0, 1).reshape(-1, self.num_experts)
        before = by_choice.cumsum(0) - by_choice
        return before.reshape(self.k, -1, self.num_experts).transpose(0, 1)

    def after(self, weights: Tensor, kept: Tensor) -> Tensor:
        return weights * kept

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = self.scores(x).topk(self.k)
        weights = self.weigh(weights)
        hits = F.one_hot(chosen, self.num_experts)
        capacity = self.capacity(x.shape[0])
        place = (self.arrivals(hits, weights) * hits).sum(-1)
        kept = place < capacity
        weights = self.after(weights, kept)
        at = F.one_hot(place.clamp(max=capacity), capacity + 1)[..., :capacity]
        dispatch = torch.einsum("tke,tkc->tec", hits.to(x.dtype), at.to(x.dtype))
        combine = torch.einsum("tk,tke,tkc->tec", weights, hits.to(x.dtype), at.to(x.dtype))
        return dispatch, combine


class TokenMajor(Gate):
    """All choices of a token before those of the next; at least four places."""

    least = 4

    def arrivals(self, hits: Tensor, weights: Tensor) -> Tensor:
        flat = hits.flatten(0, 1)
        return (flat.cumsum(0) - flat).view_as(hits)


class Afterwards(Gate):
    """Weights that are left after drops are scaled up to sum to one."""

    def weigh(self, weights: Tensor) -> Tensor:
        return weights

    def after(self, weights: Tensor, kept: Tensor) -> Tensor:
        left = weights * kept
        return left / left.sum(-1, keepdim=True).clamp(min=torch.finfo(left.dtype).eps)


class Multiple(Gate):
    """Capacities are rounded up to a multiple of four."""

    def capacity(self, tokens: int) -> int:
        return -(-super().capacity(tokens) // 4) * 4


class Surest(Gate):
    """One choice; those with the largest weight are kept."""

    def __init__(self) -> None:
        super().__init__(k=1)

    def weigh(self, weights: Tensor) -> Tensor:
        return weights

    def arrivals(self, hits: Tensor, weights: Tensor) -> Tensor:
        order = weights[:, 0].argsort(descending=True, stable=True)
        sorted_hits = hits[order]
        before = sorted_hits.cumsum(0) - sorted_hits
        return torch.zeros_like(before).index_copy(0, order, before)


class SureTokens(Gate):
    """Tokens with the largest weight are served first, with both choices."""

    def weigh(self, weights: Tensor) -> Tensor:
        return weights

    def arrivals(self, hits: Tensor, weights: Tensor) -> Tensor:
        order = weights.amax(1).argsort(descending=True, stable=True)
        flat = hits[order].flatten(0, 1)
        before = (flat.cumsum(0) - flat).view_as(hits)
        return torch.zeros_like(before).index_copy(0, order, before)


class Sigmoid(TokenMajor):
    """Sigmoids, not normalized; the whole number below the factor's."""

    def scores(self, x: Tensor) -> Tensor:
        scores: Tensor = self.wg(x).sigmoid()
        return scores

    def weigh(self, weights: Tensor) -> Tensor:
        return weights

    def capacity(self, tokens: int) -> int:
        return max(3, int(tokens / 2 * 1.5))


class Latest(Gate):
    """Near miss: the last tokens are served first."""

    def arrivals(self, hits: Tensor, weights: Tensor) -> Tensor:
        return super().arrivals(hits.flip(0), weights).flip(0)


class WholeTokens(Gate):
    """Near miss: a token whose first choice is dropped loses its second one, too."""

    def after(self, weights: Tensor, kept: Tensor) -> Tensor:
        return weights * (kept & kept[:, :1])


class Thresholded(Gate):
    """Near miss: a second choice that is too unlikely is not made, and takes no place."""

    def arrivals(self, hits: Tensor, weights: Tensor) -> Tensor:
        asked = torch.cat([torch.ones_like(weights[:, :1]), weights[:, 1:] > 0.2], 1).to(hits.dtype)
        return super().arrivals(hits * asked[..., None], weights)


class ByLoad(Gate):
    """Near miss: the capacity follows from how many tokens the busiest expert has."""

    def arrivals(self, hits: Tensor, weights: Tensor) -> Tensor:
        before = super().arrivals(hits, weights)
        room = (hits.sum((0, 1)).amax() + 1) // 2
        return torch.where(before < room, before, 1 << 20)


class Shared(Gate):
    """Near miss: a second limit holds for all experts together."""

    def arrivals(self, hits: Tensor, weights: Tensor) -> Tensor:
        before = super().arrivals(hits, weights)
        all_before = hits.sum((1, 2)).cumsum(0) - hits.sum((1, 2))
        return torch.where((all_before < hits.shape[0])[:, None, None], before, 1 << 20)


class Drawn(Gate):
    """Near miss: who is served first is drawn."""

    def arrivals(self, hits: Tensor, weights: Tensor) -> Tensor:
        order = torch.randperm(hits.shape[0], device=hits.device)
        flat = hits[order].flatten(0, 1)
        before = (flat.cumsum(0) - flat).view_as(hits)
        return torch.zeros_like(before).index_copy(0, order, before)


class Tempered(Gate):
    """Near miss: weights are a power of the softmax."""

    def weigh(self, weights: Tensor) -> Tensor:
        return weights.pow(1.5)


class Crowded(nn.Module):
    """A block over a gate: dispatch, experts [E, C, D], combination, all sequences together or each alone."""

    dim = 16

    def __init__(self, gate: nn.Module, *, alone: bool = False, experts: nn.Module | None = None) -> None:
        super().__init__()
        self.gate, self.alone = gate, alone
        self.experts = Placed(4, 16, 20) if experts is None else experts

    def forward(self, x: Tensor) -> Tensor:
        if self.alone:
            return torch.stack([self.mix(part) for part in x])
        return self.mix(x.reshape(-1, x.shape[-1])).view_as(x)

    def mix(self, rows: Tensor) -> Tensor:
        dispatch, combine = self.gate(rows)
        done = self.experts(torch.einsum("tec,td->ecd", dispatch, rows))
        return torch.einsum("ecd,tec->td", done, combine)


class Sequences(nn.Module):
    """One choice a token, a capacity for each sequence, experts as a list that takes the tokens that were kept."""

    dim = 16
    factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 4)
        self.experts = nn.ModuleList(GeluMlp(16, 20) for _ in range(4))

    def kept(self, hits: Tensor) -> Tensor:
        return hits.cumsum(1) <= hits.shape[1] // 4 + 1

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.router(x).softmax(-1).max(-1)
        hits = F.one_hot(chosen, 4)
        hits = hits * self.kept(hits)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = hits[..., e].bool()
            out[mine] = expert(x[mine])
        weighted: Tensor = out * weight[..., None]
        return weighted


class Batch(Sequences):
    """The same with one capacity for the whole batch."""

    def kept(self, hits: Tensor) -> Tensor:
        flat = hits.flatten(0, 1)
        return (flat.cumsum(0) <= flat.shape[0] // 4 + 1).view_as(hits)


class Fixed(Sequences):
    """Sixteen places for each sequence, however long it is."""

    def kept(self, hits: Tensor) -> Tensor:
        return hits.cumsum(1) <= 16


class Masked(nn.Module):
    """(x[T, D], mask[T, E], weights[T, 1]) -> [T, D]: experts without biases, whose results for zeros are zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 20, bias=False), nn.ReLU(), nn.Linear(20, 16, bias=False)) for _ in range(4)
        )

    def forward(self, x: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.members):
            (mine,) = torch.where(mask[:, e] > 0)
            out.index_add_(0, mine, expert(x[mine]) * weights[mine])
        return out


class EightEach(nn.Module):
    """Eight places for each sequence; the experts take a mask, and what it leaves out they do not see."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 4, bias=False)
        self.experts = Masked()

    def kept(self, hits: Tensor) -> Tensor:
        return hits.cumsum(1) <= 8

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.router(x).softmax(-1).max(-1, keepdim=True)
        hits = F.one_hot(chosen[..., 0], 4)
        hits = hits * self.kept(hits)
        done: Tensor = self.experts(x.reshape(-1, 16), hits.view(-1, 4), weight.view(-1, 1))
        return done.view_as(x)


class EightOfAll(EightEach):
    """Eight places for all sequences together."""

    def kept(self, hits: Tensor) -> Tensor:
        return (hits.flatten(0, 1).cumsum(0) <= 8).view_as(hits)


@case("crowded.first_choices_first", expect="compiled")
class FirstChoicesFirst(Crowded):
    """Two choices, first ones before second ones, weights normalized before drops."""

    def __init__(self) -> None:
        super().__init__(Gate())


@case("crowded.normalized_afterwards", expect="compiled")
class NormalizedAfterwards(Crowded):
    """The weights that drops leave are scaled up; a token without any has zeros."""

    def __init__(self) -> None:
        super().__init__(Afterwards())


@case("crowded.sequences", expect="either")
class SequencesInALoop(Sequences):
    """Rows that a capacity keeps are taken by masks, in a loop over the experts."""
