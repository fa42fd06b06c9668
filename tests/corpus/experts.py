"""Adversarial experts: bodies that are not all alike, shared, wired oddly, or more than two matrices and a curve."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tests.corpus.blocks import GeluMlp, LoopList, LoopStacked, Sorted, Swiglu
from tests.corpus.case import case


def as_if_distinct(m: Any, x: Tensor) -> Tensor:
    rows = x.reshape(-1, m.dim)
    weights, ids = m.route(rows)
    distinct = list(dict.fromkeys(m.experts))  # what `children()` would list: 7 experts, the rest shifted by one
    out = torch.zeros_like(rows)
    for e in range(m.num_experts):
        token, slot = torch.where(ids == e)
        out.index_add_(0, token, distinct[e % 7](rows[token]) * weights[token, slot, None])
    return out.view_as(x)


def straight(m: Any, x: Tensor) -> Tensor:
    rows = x.reshape(-1, m.dim)
    weights, ids = m.route(rows)
    out = torch.zeros_like(rows)
    for e in range(m.num_experts):
        token, slot = torch.where(ids == e)
        out.index_add_(0, token, LoopStacked.expert(m, e, rows[token]) * weights[token, slot, None])
    return out.view_as(x)


def without_norm(m: Any, x: Tensor) -> Tensor:
    rows = x.reshape(-1, m.dim)
    weights, ids = m.route(rows)
    out = torch.zeros_like(rows)
    for e in range(m.num_experts):
        token, slot = torch.where(ids == e)
        out.index_add_(0, token, m.experts[e](rows[token]) * weights[token, slot, None])
    return out.view_as(x)


def like_first(m: Any, x: Tensor) -> Tensor:
    """Every expert's weights through the body of expert 0."""
    rows = x.reshape(-1, m.dim)
    weights, ids = m.route(rows)
    out = torch.zeros_like(rows)
    for e in range(m.num_experts):
        token, slot = torch.where(ids == e)
        body = m.experts[e]
        h = F.gelu(F.linear(rows[token], body.fc1.weight, body.fc1.bias))
        out.index_add_(0, token, F.linear(h, body.fc2.weight, body.fc2.bias) * weights[token, slot, None])
    return out.view_as(x)


@case("experts.shared_object", decoy=as_if_distinct)
class SharedObject(LoopList):
    """Experts 1 and 5 are the same object, so `children()` lists one fewer than there are."""

    def build_experts(self) -> None:
        super().build_experts()
        self.experts[5] = self.experts[1]


@case("experts.bias_in_some")
class BiasInSome(LoopList):
    """Odd experts have biases, even ones have none."""

    def build_experts(self) -> None:
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 24, bias=e % 2 == 1), nn.GELU(), nn.Linear(24, 16, bias=e % 2 == 1))
            for e in range(self.num_experts)
        )


@case("experts.mixed_widths")
class MixedWidths(LoopList):
    """Every expert has a width of its own."""

    def build_experts(self) -> None:
        self.experts = nn.ModuleList(GeluMlp(self.dim, 12 + 4 * e) for e in range(self.num_experts))


class GeluExperts(LoopList):
    def __init__(self) -> None:
        super().__init__(body="gelu")


@case("experts.one_other_activation", decoy=like_first)
class OneOtherActivation(GeluExperts):
    """Expert 6 uses tanh, the others GELU; same parameters, same shapes."""

    def build_experts(self) -> None:
        super().build_experts()
        self.experts[6].act = nn.Tanh()


@case("experts.gelu_and_gelu_tanh", decoy=like_first, decoy_floor=2e-5)
class NearlyEqualActivations(GeluExperts):
    """Expert 2 uses the tanh approximation of GELU: at most 5e-4 away, in one expert of eight."""

    def build_experts(self) -> None:
        super().build_experts()
        self.experts[2].act = nn.GELU(approximate="tanh")


@case("experts.dead_other_activation", decoy=like_first, perturb=lambda m: m.wake())
class DeadOtherActivation(GeluExperts):
    """Expert 7 is never picked (until its router bias is raised after compiling) and is the one that uses tanh."""

    def build_router(self) -> None:
        self.router = nn.Linear(self.dim, self.num_experts)

    def build_experts(self) -> None:
        super().build_experts()
        self.experts[7].act = nn.Tanh()

    def fill_(self, generator: torch.Generator) -> None:
        self.router.weight[7] = 0
        self.router.bias[7] = -1e4

    def wake(self) -> None:
        with torch.no_grad():
            self.router.bias[7] = 1.0


@case("experts.identity", others=7, unseen=True)
class IdentityExpert(LoopList):
    """The last expert is nn.Identity."""

    def build_experts(self) -> None:
        super().build_experts()
        self.experts[-1] = nn.Identity()


@case("experts.zero_and_constant")
class ZeroAndConstant(LoopStacked):
    """Expert 0 returns zeros, expert 1 returns a learned vector; the stacked weights have rows for both."""

    def build_experts(self) -> None:
        super().build_experts()
        self.constant = nn.Parameter(torch.empty(self.dim))

    def expert(self, e: int, rows: Tensor) -> Tensor:
        if e == 0:
            return torch.zeros_like(rows)
        if e == 1:
            return self.constant.expand_as(rows)
        return super().expert(e, rows)


@case("experts.permuted_wiring", decoy=straight)
class PermutedWiring(LoopStacked):
    """Expert e uses slice 3e + 1 (mod 8) of the first matrix and slice e of the second."""

    def expert(self, e: int, rows: Tensor) -> Tensor:
        p = (3 * e + 1) % self.num_experts
        return F.linear(F.silu(F.linear(rows, self.w1[p])) * F.linear(rows, self.w3[p]), self.w2[e])


@case("experts.permuted_by_buffer")
class PermutedByBuffer(Sorted):
    """A buffer maps router classes to experts; load balancing rewrites it at run time."""

    placement: Tensor

    def build_experts(self) -> None:
        super().build_experts()
        self.register_buffer("placement", torch.randperm(self.num_experts))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(x)
        return weights, self.placement[ids]


@case("experts.tied_up_down")
class TiedUpDown(LoopStacked):
    """The second matrix is the first one transposed."""

    def build_experts(self) -> None:
        self.w1 = nn.Parameter(torch.empty(self.num_experts, self.hidden, self.dim))

    def expert(self, e: int, rows: Tensor) -> Tensor:
        return F.gelu(rows @ self.w1[e].T) @ self.w1[e]


@case("experts.shared_down")
class SharedDown(LoopStacked):
    """Expert-specific first matrices, one second matrix for all."""

    def build_experts(self) -> None:
        self.w1 = nn.Parameter(torch.empty(self.num_experts, self.hidden, self.dim))
        self.down = nn.Linear(self.hidden, self.dim)

    def expert(self, e: int, rows: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(rows @ self.w1[e].T))
        return out


@case("experts.parametrized", expect="left alone", reason=("parametri",))
class Parametrized(LoopList):
    """Weights computed by torch.nn.utils.parametrizations.weight_norm at each access."""

    def build_experts(self) -> None:
        super().build_experts()
        for expert in self.experts:
            assert isinstance(expert, Swiglu)
            parametrizations.weight_norm(expert.w1)


@case("experts.scaled_weight", decoy=straight)
class ScaledWeight(LoopStacked):
    """The weight is a product of two parameters, formed at each call."""

    def build_experts(self) -> None:
        super().build_experts()
        self.gain = nn.Parameter(torch.empty(self.num_experts))

    def expert(self, e: int, rows: Tensor) -> Tensor:
        w1 = self.w1[e] * self.gain[e]
        return F.linear(F.silu(F.linear(rows, w1)) * F.linear(rows, self.w3[e]), self.w2[e])


@case("experts.masked_weight")
class MaskedWeight(LoopList):
    """Pruned by a buffer of zeros and ones multiplied into the weight."""

    mask: Tensor

    def build_experts(self) -> None:
        super().build_experts()
        self.register_buffer("mask", (torch.rand(self.num_experts, self.hidden, self.dim) > 0.3).float())

    def expert(self, e: int, rows: Tensor) -> Tensor:
        body = self.experts[e]
        assert isinstance(body, Swiglu)
        out: Tensor = body.w2(F.silu(F.linear(rows, body.w1.weight * self.mask[e])) * body.w3(rows))
        return out
