"""Adversarial selection: who picks the experts, from what, and how many."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.corpus.blocks import Gathered, LoopList, LoopStacked, Sorted, naive
from tests.corpus.case import Args, as_layout, case


def _biased_weights(m: Any, x: Tensor) -> Tensor:
    rows = x.reshape(-1, m.dim)
    weights, ids = (m.router(rows).softmax(-1) + m.correction).topk(m.top_k)
    out: Tensor = m.mix(rows, weights / weights.sum(-1, keepdim=True), ids)
    return out.view_as(x)


@case("selection.bias_only", decoy=_biased_weights)
class BiasOnlyForSelection(Sorted):
    """A correction bias decides who is picked; the weights come from the unbiased probabilities."""

    correction: Tensor

    def build_router(self) -> None:
        super().build_router()
        self.register_buffer("correction", torch.randn(self.num_experts) * 0.3)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        probability = self.router(x).softmax(-1)
        ids = (probability + self.correction).topk(self.top_k).indices
        weights = probability.gather(1, ids)
        return weights / weights.sum(-1, keepdim=True), ids


class GroupLimited(LoopList):
    """Two of four groups are kept; the others are filled with `fill`."""

    fill = float("-inf")
    correction: Tensor

    def build_router(self) -> None:
        super().build_router()
        self.register_buffer("correction", torch.randn(self.num_experts) * 0.4 - 0.9)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.route_filled(x, self.fill)

    def route_filled(self, x: Tensor, fill: float) -> tuple[Tensor, Tensor]:
        scores = self.router(x).sigmoid()
        biased = scores + self.correction
        best = biased.view(-1, 4, 2).amax(-1).topk(2).indices
        kept = torch.zeros(x.shape[0], 4, dtype=torch.bool, device=x.device).scatter_(1, best, True)
        masked = biased.masked_fill(~kept.repeat_interleave(2, 1), fill)
        ids = masked.topk(self.top_k).indices
        weights = scores.gather(1, ids)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20), ids


def _other_fill(m: Any, x: Tensor) -> Tensor:
    rows = x.reshape(-1, m.dim)
    other = 0.0 if m.fill < 0 else float("-inf")
    out: Tensor = m.mix(rows, *m.route_filled(rows, other))
    return out.view_as(x)


@case("selection.group_fill_inf", decoy=_other_fill)
class GroupFillInf(GroupLimited):
    """Groups that lost are filled with -inf."""


@case("selection.group_fill_zero", decoy=_other_fill)
class GroupFillZero(GroupLimited):
    """Groups that lost are filled with 0, which beats a negative biased score: their experts can win."""

    fill = 0.0


@case("selection.ties")
class Ties(Gathered):
    """Logits rounded to halves: nearly every token has ties at the cut, and torch's order must be kept."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = (self.router(x) * 2).round() / 2
        weights, ids = logits.softmax(-1).topk(self.top_k)
        return weights / weights.sum(-1, keepdim=True), ids


@case("selection.twin_routers")
class TwinRouterRows(LoopList):
    """Experts 2i and 2i + 1 have the same router row, so their probabilities are always equal."""

    def fill_(self, generator: torch.Generator) -> None:
        self.router.weight[1::2] = self.router.weight[0::2]


@case("selection.argmin", decoy=naive)
class Argmin(LoopStacked):
    """Distances, not scores: the smallest ones win."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        distance, ids = self.router(x).topk(self.top_k, largest=False)
        return (-distance).softmax(-1), ids


class Masked(LoopList):
    """A [T, E] gate of zeros and weights: the number of experts varies from token to token."""

    def gate(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.dim)
        gate = self.gate(rows)
        out = torch.zeros_like(rows)
        for e in range(self.num_experts):
            token = gate[:, e].nonzero().squeeze(1)
            if token.numel():
                out[token] += gate[token, e, None] * self.expert(e, rows[token])
        return out.view_as(x)


@case("selection.threshold", decoy=naive)
class Threshold(Masked):
    """Every expert above 0.2 takes part: none, one or four of them."""

    def gate(self, x: Tensor) -> Tensor:
        probability = self.router(x).softmax(-1)
        result: Tensor = probability * (probability > 0.2)
        return result


@case("selection.top_p", decoy=naive)
class TopP(Masked):
    """The smallest set of experts whose probabilities sum to 0.6."""

    def gate(self, x: Tensor) -> Tensor:
        probability = self.router(x).softmax(-1)
        ranked, order = probability.sort(-1, descending=True)
        kept = ranked.cumsum(-1) - ranked < 0.6
        kept = torch.zeros_like(kept).scatter(-1, order, kept)
        gate = probability * kept
        result: Tensor = gate / gate.sum(-1, keepdim=True)
        return result


def _without_duplicates(m: Any, x: Tensor) -> Tensor:
    rows = x.reshape(-1, m.dim)
    weights, ids = m.route(rows)
    weights = torch.cat([weights[:, :1], weights[:, 1:] * (ids[:, 1:] != ids[:, :1])], -1)
    out: Tensor = m.mix(rows, weights, ids)
    return out.view_as(x)


@case("selection.duplicates", decoy=_without_duplicates)
class Duplicates(Sorted):
    """Two heads pick one expert each, often the same one: it then counts twice."""

    def build_router(self) -> None:
        super().build_router()
        self.router_b = nn.Linear(self.dim, self.num_experts, bias=False)

    def fill_(self, generator: torch.Generator) -> None:
        self.router_b.weight.copy_(self.router.weight + 0.1 * self.router_b.weight)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        one, id_one = self.router(x).softmax(-1).max(-1)
        two, id_two = self.router_b(x).softmax(-1).max(-1)
        return torch.stack([one, two], -1), torch.stack([id_one, id_two], -1)


@case("selection.constant_experts", min_experts=2)
class ConstantExperts(LoopList):
    """Experts 0 and 3 always, whatever the token: ids do not depend on x, only the weights do."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ids = torch.tensor([0, 3], device=x.device).expand(x.shape[0], 2)
        return self.router(x).gather(1, ids).softmax(-1), ids


def _with_ids(tokens: Tensor) -> Args:
    x = as_layout(tokens, "btd")
    ids = torch.arange(tokens.shape[0]).mul(7919).remainder(97).view(x.shape[:-1])
    return x, ids


@case("selection.hash_ids", args=_with_ids, needs_inputs=True)
class HashOfTokenIds(LoopList):
    """Routed by a table over token ids, a second input: x says nothing about the expert."""

    table: Tensor

    def build_router(self) -> None:
        table = torch.stack([torch.randperm(self.num_experts)[: self.top_k] for _ in range(97)])
        self.register_buffer("table", table)
        self.mixing = nn.Linear(self.dim, self.top_k)

    def forward(self, x: Tensor, token_ids: Tensor) -> Tensor:  # type: ignore[override]
        rows = x.reshape(-1, self.dim)
        ids = self.table[token_ids.reshape(-1)]
        return self.mix(rows, self.mixing(rows).softmax(-1), ids).view_as(x)


@case("selection.position", layout="btd")
class ByPosition(LoopList):
    """Routed by position in the sequence, not by content: a flattened probe sees other positions."""

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        position = torch.arange(tokens, device=x.device).repeat(batch)
        ids = torch.stack([position % self.num_experts, (position // 3 + 1) % self.num_experts], -1)
        weights = F.softmax(self.router(x.reshape(-1, self.dim)).gather(1, ids), -1)
        return self.mix(x.reshape(-1, self.dim), weights, ids).view_as(x)


@case("selection.two_level", decoy=naive)
class TwoLevel(Gathered):
    """One router picks a group of four, another one an expert in it; probabilities multiply."""

    def build_router(self) -> None:
        super().build_router()
        self.router_group = nn.Linear(self.dim, 2)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        share, group = self.router_group(x).softmax(-1).max(-1)
        inside = self.router(x).view(-1, 2, 4)[torch.arange(len(x)), group].softmax(-1)
        weights, ids = inside.topk(self.top_k)
        return weights * share[:, None], ids + 4 * group[:, None]


@case("selection.float64_router")
class DoubleRouter(LoopList):
    """The router runs in float64; in float32 near-ties would fall the other way."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(x.double(), self.router.weight.double())
        weights, ids = logits.softmax(-1).topk(self.top_k)
        return (weights / weights.sum(-1, keepdim=True)).to(x.dtype), ids


@case("selection.plain_attribute", perturb=lambda m: m.swap(), perturb_twin=True)
class PlainAttributeBias(LoopList):
    """The selection's bias is a plain tensor attribute, neither parameter nor buffer, rewritten after compiling."""

    def build_router(self) -> None:
        super().build_router()
        self.plain_bias = torch.linspace(-0.4, 0.4, self.num_experts)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        probability = self.router(x).softmax(-1)
        ids = (probability + self.plain_bias).topk(self.top_k).indices
        return probability.gather(1, ids), ids

    def swap(self) -> None:
        self.plain_bias.neg_()


@case("selection.replaced_attribute", perturb=lambda m: m.replace_bias(), perturb_twin=True)
class ReplacedAttributeBias(PlainAttributeBias):
    """As above, and the attribute is bound to a new tensor."""

    def replace_bias(self) -> None:
        self.plain_bias = -self.plain_bias


@case("selection.favourite")
class Favourite(LoopList):
    """Expert 0 is picked by all tokens of nearly every short batch: its rows look like the input itself."""

    def build_router(self) -> None:
        self.router = nn.Linear(self.dim, self.num_experts)

    def fill_(self, generator: torch.Generator) -> None:
        self.router.bias[0] = 6.5


@case("selection.favourite_stacked")
class FavouriteStacked(LoopStacked):
    """As above with experts in 3-D parameters and GELU."""

    def __init__(self) -> None:
        super().__init__(experts=6, top_k=4, body="gelu")

    build_router = Favourite.build_router
    fill_ = Favourite.fill_


@case("selection.null_expert")
class NullExpert(LoopList):
    """The router has one class more than there are experts: who picks it adds nothing for that slot."""

    def build_router(self) -> None:
        self.router = nn.Linear(self.dim, self.num_experts + 1, bias=False)


@case("selection.offset_ids", decoy=naive)
class OffsetIds(LoopStacked):
    """Class c of the router means expert (c + 1) mod E."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(x)
        return weights, (ids + 1) % self.num_experts


@case("selection.sorted_by_id")
class SortedById(Gathered):
    """Slots are put in ascending order of expert before mixing: slot order is not weight order."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(x)
        ids, order = ids.sort(-1)
        return weights.gather(1, order), ids
