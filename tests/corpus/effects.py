"""Adversarial side effects: what a block does besides computing its result."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.corpus.blocks import Gathered, LoopList, LoopStacked, Sorted, naive
from tests.corpus.case import case

RANDOM = ("random", "RNG", "rng", "determinis")
MUTATION = ("input", "in place", "in-place", "mutat")


@case("effects.input_scaled_in_place", inline_expect="left alone", mutates_input=True, reason=MUTATION)
class InputScaledInPlace(LoopList):
    """The caller's tensor is doubled in place before routing, in eval too."""

    def forward(self, x: Tensor) -> Tensor:
        x *= 2
        out: Tensor = super().forward(x)
        return out


@case("effects.input_becomes_output", inline_expect="left alone", mutates_input=True, reason=MUTATION)
class InputBecomesOutput(LoopStacked):
    """The mixture is added into the caller's tensor, which is also what is returned."""

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(super().forward(x.clone()))


@case("effects.weights_in_place")
class WeightsInPlace(LoopList):
    """In-place division of the top-k values: a view of nothing the caller sees, so harmless."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.router(x).softmax(-1).topk(self.top_k)
        weights /= weights.sum(-1, keepdim=True)
        return weights, ids


@case("effects.count_buffer")
class CountBuffer(LoopStacked):
    """A buffer counts how many tokens each expert got; balancing reads it later."""

    tokens_per_expert: Tensor

    def build_router(self) -> None:
        super().build_router()
        self.register_buffer("tokens_per_expert", torch.zeros(self.num_experts))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(x)
        with torch.no_grad():
            self.tokens_per_expert += torch.bincount(ids.flatten(), minlength=self.num_experts)
        return weights, ids


@case("effects.count_rebound")
class CountRebound(Sorted):
    """The count buffer is rebound (`self.counts = self.counts + ...`): a new tensor object at every call."""

    counts: Tensor

    def build_router(self) -> None:
        super().build_router()
        self.register_buffer("counts", torch.zeros(self.num_experts, dtype=torch.long), persistent=False)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(x)
        self.counts = self.counts + F.one_hot(ids, self.num_experts).sum((0, 1))
        return weights, ids


@case("effects.expert_counters")
class ExpertCounters(LoopList):
    """Each expert module counts its own calls in a Python attribute."""

    def build_experts(self) -> None:
        super().build_experts()
        self.hits = [0] * self.num_experts

    def expert(self, e: int, rows: Tensor) -> Tensor:
        self.hits[e] += 1
        return super().expert(e, rows)


@case("effects.python_counter")
class PythonCounter(LoopList):
    """Counts its calls in a plain attribute; the result does not depend on it."""

    def build_router(self) -> None:
        super().build_router()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = super().forward(x)
        return out


@case("effects.aux_loss")
class AuxLoss(LoopList):
    """The balancing loss of the last call is left in an attribute, as a tensor."""

    def build_router(self) -> None:
        super().build_router()
        self.aux_loss: Tensor | None = None

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        probability = self.router(x).softmax(-1)
        weights, ids = probability.topk(self.top_k)
        load = F.one_hot(ids, self.num_experts).float().mean((0, 1))
        self.aux_loss = self.num_experts * (load * probability.mean(0)).sum()
        return weights / weights.sum(-1, keepdim=True), ids


@case("effects.last_ids")
class LastIds(Gathered):
    """The picks of the last call are kept in a list of a dict, for a monitor to read."""

    def build_router(self) -> None:
        super().build_router()
        self.monitor: dict[str, list[Tensor]] = {"ids": []}

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(x)
        self.monitor["ids"] = [ids]
        return weights, ids


@case("effects.token_count")
class TokenCount(LoopList):
    """The number of tokens of the last call is left in an attribute, for a throughput meter."""

    def mix(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        self.last_count = x.shape[0]
        return super().mix(x, weights, ids)


@case("effects.first_call_flag")
class FirstCallFlag(LoopStacked):
    """The first call sets a flag that a class attribute announced with the same value."""

    warmed_up = False

    def mix(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        self.warmed_up = False
        return super().mix(x, weights, ids)


class Losses:
    """A loss collector that lives outside of any module."""

    seen: list[float] = []  # noqa: RUF012 - shared on purpose: the effect leaves the module


@case("effects.global_list", outside=lambda: list(Losses.seen))
class GlobalList(LoopList):
    """Appends to a list outside the module: nothing in the module shows it."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(x)
        Losses.seen.append(float(weights.nan_to_num().mean()))
        return weights, ids


@case("effects.rng_in_eval", inline_expect="left alone", random=True, reason=RANDOM)
class RngInEval(LoopList):
    """Noise on the logits in eval too."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.router(x)
        top, ids = (logits + torch.randn_like(logits)).topk(self.top_k)
        return top.softmax(-1), ids


@case("effects.dropout_in_eval", expect="left alone", random=True, reason=RANDOM)
class DropoutInEval(LoopStacked):
    """Functional dropout without `training=`: always on."""

    def expert(self, e: int, rows: Tensor) -> Tensor:
        return F.dropout(super().expert(e, rows), 0.2)


@case("effects.rng_thrown_away", random=True)
class RngThrownAway(LoopList):
    """Draws random numbers and multiplies them by zero: the result is the same, the generator is not."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(x)
        return weights + 0 * torch.rand_like(weights), ids


@case("effects.jitter_in_training", expect="compiled")
class JitterInTraining(LoopList):
    """Router jitter in training only."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.training:
            x = x * torch.empty_like(x).uniform_(0.98, 1.02)
        return super().route(x)


@case("effects.expert_dropout_in_training", expect="compiled")
class ExpertDropoutInTraining(Sorted):
    """Whole experts are dropped in training only."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(x)
        if self.training:
            weights = weights * (torch.rand_like(weights) > 0.1)
        return weights, ids


@case("effects.detached_gate", decoy=None)
class DetachedGate(LoopList):
    """The weights are detached: no gradient reaches the router."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(x)
        return weights.detach(), ids


@case("effects.straight_through")
class StraightThrough(LoopStacked):
    """Forward uses hard weights of one half, backward the soft ones."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(x)
        return (torch.full_like(weights, 0.5) - weights).detach() + weights, ids


@case("effects.returns_input_alias")
class ReturnsInputAlias(LoopList):
    """Returns (out, x): the second output is the caller's tensor itself, not a copy."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x


@case("effects.inner_no_grad")
class InnerNoGrad(LoopList):
    """The result is computed under no_grad and therefore never requires a gradient."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        return out


@case("effects.moves_router")
class MovesRouter(LoopList):
    """`self.router = self.router.float()` in every forward: a module is assigned while it runs."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.router = self.router.to(torch.float32)
        return super().route(x)


@case("effects.lazy_cache")
class LazyCache(LoopStacked):
    """Transposed weights are cached at the first call; a later write to the weights is not seen by the original."""

    def build_experts(self) -> None:
        super().build_experts()
        self.cache: Tensor | None = None

    def expert(self, e: int, rows: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = self.w1.detach().transpose(1, 2).contiguous()
        return F.linear(F.silu(rows @ self.cache[e]) * F.linear(rows, self.w3[e]), self.w2[e])


@case("effects.global_grad_mode", decoy=naive)
class ReadsGradMode(LoopList):
    """Weights depend on whether gradients are being recorded."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(x)
        return (weights if torch.is_grad_enabled() else weights.flip(-1)), ids


class Wrapper(nn.Module):
    """Keyword arguments and a dict as the result."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.block = LoopList()

    def forward(self, x: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
        return {"out": self.block(x) * scale, "norm": x.norm(dim=-1)}


case("effects.dict_result", expect="compiled")(Wrapper)
