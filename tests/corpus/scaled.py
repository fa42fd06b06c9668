"""Experts with a vector of their own that multiplies hidden values, and vectors that do something else.

T tokens, D model width, K experts a token, E experts, C places, F expert width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.corpus.blocks import Gathered, LoopList, LoopStacked
from tests.corpus.case import case
from tests.corpus.experts import straight
from tests.corpus.placed import CapacitySubmodule


class Geglu(nn.Module):
    """[N, 2F] -> [N, F]: the gate second, the product times a vector."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(hidden))

    def forward(self, x: Tensor) -> Tensor:
        up, gate = x.chunk(2, dim=-1)
        scaled: Tensor = F.gelu(gate) * up * self.scale
        return scaled


def geglu(dim: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, 2 * hidden), Geglu(hidden), nn.Linear(hidden, dim))


@case("scaled.listed", expect="compiled")
class ScaledListed(LoopList):
    """Each expert is a Sequential whose middle module gates and multiplies by a vector of its own."""

    def build_experts(self) -> None:
        self.experts = nn.ModuleList(geglu(self.dim, self.hidden) for _ in range(self.num_experts))


class _Chunked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList(geglu(16, 20) for _ in range(4))

    def forward(self, rows: Tensor) -> Tensor:
        parts = rows.movedim(1, 0)
        return torch.stack([expert(part) for expert, part in zip(self.members, parts, strict=True)]).movedim(0, 1)


@case("scaled.capacity_list", expect="compiled", random=True)
class ScaledCapacity(CapacitySubmodule):
    """A capacity einsum over a list of such experts; the second choice is drawn in eval by the router alone."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = _Chunked()

    def forward(self, x: Tensor) -> Tensor:
        dispatch, combine = self.router(x)
        combine = combine * (torch.rand(x.shape[:2]) < 0.9)[..., None, None]
        rows = torch.einsum("bsd,bsec->becd", x, dispatch)
        return torch.einsum("becd,bsec->bsd", self.experts(rows), combine)


def _scaled(rows: Tensor, m: Any, e: int) -> Tensor:
    scaled: Tensor = F.silu(F.linear(rows, m.w1[e])) * F.linear(rows, m.w3[e]) * m.scale[e]
    return scaled


def scaled_straight(m: Any, x: Tensor) -> Tensor:
    """Every expert's hidden values times its own vector."""
    rows = x.reshape(-1, m.dim)
    weights, ids = m.route(rows)
    out = torch.zeros_like(rows)
    for e in range(m.num_experts):
        token, slot = torch.where(ids == e)
        out.index_add_(0, token, F.linear(_scaled(rows[token], m, e), m.w2[e]) * weights[token, slot, None])
    return out.view_as(x)


@case("scaled.stacked", expect="compiled", decoy=straight)
class ScaledStacked(LoopStacked):
    """The vectors are a stack [E, F]."""

    def build_experts(self) -> None:
        super().build_experts()
        self.scale = nn.Parameter(torch.empty(self.num_experts, self.hidden))

    def expert(self, e: int, rows: Tensor) -> Tensor:
        return F.linear(_scaled(rows, self, e), self.w2[e])


@case("scaled.shared", expect="compiled", decoy=straight)
class ScaledShared(LoopStacked):
    """One vector serves all experts."""

    def build_experts(self) -> None:
        super().build_experts()
        self.scale = nn.Parameter(torch.empty(self.hidden))

    def expert(self, e: int, rows: Tensor) -> Tensor:
        hidden = self.scale * F.silu(F.linear(rows, self.w1[e])) * F.linear(rows, self.w3[e])
        return F.linear(hidden, self.w2[e])


@case("scaled.gathered", expect="compiled")
class ScaledGathered(Gathered):
    """The vectors are gathered for each token like the matrices."""

    def build_experts(self) -> None:
        super().build_experts()
        self.scale = nn.Parameter(torch.empty(self.num_experts, self.hidden))

    def mix(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        gate = F.silu(torch.einsum("td,tkfd->tkf", x, self.w1[ids]))
        hidden = gate * torch.einsum("td,tkfd->tkf", x, self.w3[ids]) * self.scale[ids]
        return torch.einsum("tkd,tk->td", torch.einsum("tkf,tkdf->tkd", hidden, self.w2[ids]), weights)


@case("scaled.gathered_others", expect="left alone", decoy=scaled_straight)
class ScaledByOthers(ScaledGathered):
    """Each expert's hidden values take the vector of the token's other expert."""

    def mix(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        gate = F.silu(torch.einsum("td,tkfd->tkf", x, self.w1[ids]))
        hidden = gate * torch.einsum("td,tkfd->tkf", x, self.w3[ids]) * self.scale[ids.flip(1)]
        return torch.einsum("tkd,tk->td", torch.einsum("tkf,tkdf->tkd", hidden, self.w2[ids]), weights)


@case("scaled.before_activation", expect="left alone", decoy=scaled_straight, reason=("more than scale",))
class ScaledBefore(ScaledStacked):
    """The vector multiplies what goes into the activation: another function, equal only where the vector is one."""

    def expert(self, e: int, rows: Tensor) -> Tensor:
        gate = F.silu(F.linear(rows, self.w1[e]) * self.scale[e])
        return F.linear(gate * F.linear(rows, self.w3[e]), self.w2[e])


@case("scaled.by_the_batch", expect="left alone", decoy=scaled_straight, reason=("have no name here",))
class ScaledByBatch(ScaledStacked):
    """The vector is taken times the mean of the rows that the expert got."""

    def expert(self, e: int, rows: Tensor) -> Tensor:
        hidden = F.silu(F.linear(rows, self.w1[e])) * F.linear(rows, self.w3[e])
        return F.linear(hidden * (self.scale[e] * hidden.mean(0).abs()), self.w2[e])


@case("scaled.by_the_batch_alone", expect="left alone", decoy=straight)
class ScaledByBatchAlone(LoopStacked):
    """A vector made of the tokens of the call, not of parameters, multiplies hidden values."""

    def mix(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        vector = F.linear(x.mean(0), self.w1[0]).sigmoid()
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            token, slot = torch.where(ids == e)
            hidden = F.silu(F.linear(x[token], self.w1[e])) * F.linear(x[token], self.w3[e]) * vector
            out.index_add_(0, token, F.linear(hidden, self.w2[e]) * weights[token, slot, None])
        return out


@case("scaled.ffn", kind="ffn", expect="compiled")
class ScaledFfn(nn.Module):
    """A dense FFN whose hidden values a vector multiplies."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.net = geglu(16, 40)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.net(x)
        return out
