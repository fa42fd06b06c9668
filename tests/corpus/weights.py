"""Adversarial weights: each block differs from softmax, top-k, renormalise in how the picked experts are weighted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.corpus.blocks import DenseAll, Gathered, LoopList, LoopStacked, Sorted, naive
from tests.corpus.case import case


def sum_weighted(m: Any, rows: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """A plain loop over experts for blocks whose own `mix` is the peculiarity."""
    out = torch.zeros_like(rows)
    for e in range(m.num_experts):
        token, slot = torch.where(ids == e)
        out.index_add_(0, token, m.expert(e, rows[token]) * weights[token, slot, None])
    return out


def _none_decoy(m: Any, x: Tensor) -> Tensor:
    rows = x.reshape(-1, m.dim)
    weights, ids = m.router(rows).softmax(-1).topk(m.top_k)
    return sum_weighted(m, rows, weights / weights.sum(-1, keepdim=True), ids).view_as(x)


def _plain(m: Any, x: Tensor) -> Tensor:
    rows = x.reshape(-1, m.dim)
    out: Tensor = m.mix(rows, *m.router(rows).softmax(-1).topk(m.top_k))
    return out.view_as(x)


def _output_scaled(m: Any, x: Tensor) -> Tensor:
    rows = x.reshape(-1, m.dim)
    return sum_weighted(m, rows, *m.route(rows)).view_as(x)


def _squared_once(m: Any, x: Tensor) -> Tensor:
    rows = x.reshape(-1, m.dim)
    return Gathered.mix(m, rows, *m.route(rows)).view_as(x)


@case("weights.none", decoy=naive)
class NoWeights(LoopList):
    """The experts' rows are added as they are: the router only selects."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ids = self.router(x).topk(self.top_k).indices
        return torch.ones_like(ids, dtype=x.dtype), ids


@case("weights.none_unscaled", decoy=_none_decoy)
class NeverMultiplied(LoopStacked):
    """No weight tensor exists anywhere: rows are added without a multiplication."""

    def mix(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            token = torch.where((ids == e).any(-1))[0]
            out[token] = out[token] + self.expert(e, x[token])
        return out

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.dim)
        ids = self.router(rows).topk(self.top_k).indices
        return self.mix(rows, rows, ids).view_as(x)


@case("weights.sum", decoy=_plain)
class DividedBySum(Gathered):
    """Renormalised by the sum, where a reader who saw only softmax would not divide."""


@case("weights.large_eps", decoy=naive)
class LargeEps(LoopList):
    """Renormalised with eps 0.1: nearly the plain sum where the router is sure."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.router(x).softmax(-1).topk(self.top_k)
        return weights / (weights.sum(-1, keepdim=True) + 0.1), ids


@case("weights.clamped_sum", decoy=naive)
class ClampedSum(Sorted):
    """The denominator is clamped from below at 0.7: a plain renormalisation only for sure tokens."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.router(x).softmax(-1).topk(self.top_k)
        return weights / weights.sum(-1, keepdim=True).clamp(min=0.7), ids


@case("weights.l2", decoy=naive)
class L2Norm(LoopStacked):
    """Divided by the Euclidean norm of the picked weights."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.router(x).softmax(-1).topk(self.top_k)
        return F.normalize(weights, dim=-1), ids


@case("weights.double_softmax", decoy=naive)
class DoubleSoftmax(LoopList):
    """Softmax over all experts, then softmax again over the picked probabilities."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.router(x).softmax(-1).topk(self.top_k)
        return weights.softmax(-1), ids


@case("weights.squared", decoy=_squared_once)
class Squared(Gathered):
    """The weight multiplies twice: once in the router, once in the mixture."""

    def mix(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return super().mix(x, weights * weights, ids)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.router(x).softmax(-1).topk(self.top_k)
        return weights, ids


@case("weights.one_unless_nan")
class OneUnlessNan(Sorted):
    """Top-1 divided by its own sum: always exactly one, but for a NaN token. Any tensor of ones looks like it."""

    def __init__(self) -> None:
        super().__init__(experts=2, top_k=1)


def _unsigned(m: Any, x: Tensor) -> Tensor:
    rows = x.reshape(-1, m.dim)
    weights, ids = m.route(rows)
    out: Tensor = m.mix(rows, weights.abs(), ids)
    return out.view_as(x)


@case("weights.sign", decoy=_unsigned, decoy_tokens=300)
class Sign(Gathered):
    """The top logit divided by its own norm: one for nearly every token, minus one where all logits are negative."""

    def __init__(self) -> None:
        super().__init__(experts=5, top_k=1, body="relu")

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        top, ids = self.router(x).topk(1)
        return F.normalize(top, dim=-1), ids


@case("weights.negative", decoy=naive)
class Negative(Sorted):
    """tanh of the logits: weights of both signs that need not sum to anything."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.router(x)
        ids = logits.abs().topk(self.top_k).indices
        return logits.gather(1, ids).tanh(), ids


@case("weights.on_input", decoy=_output_scaled)
class OnInput(LoopList):
    """The weight scales the expert's input: not the same thing, the activation is not linear."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        top, ids = self.router(x).topk(self.top_k)
        return top.sigmoid(), ids

    def mix(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.expert(e, x[token] * weights[token, slot, None]))
        return out


@case("weights.on_hidden", decoy=_output_scaled)
class OnHidden(LoopStacked):
    """The weight scales the hidden activation; with an output bias that is not a scale of the result."""

    def __init__(self) -> None:
        super().__init__(body="gelu")

    def mix(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            token, slot = torch.where(ids == e)
            h = F.gelu(F.linear(x[token], self.w1[e], self.b1[e])) * weights[token, slot, None]
            out.index_add_(0, token, F.linear(h, self.w2[e], self.b2[e]))
        return out


def _dense_output_scaled(m: Any, x: Tensor) -> Tensor:
    rows = x.reshape(-1, m.dim)
    return DenseAll.mix(m, rows, *m.route(rows)).view_as(x)


@case("weights.on_input_dense", decoy=_dense_output_scaled)
class OnInputDense(DenseAll):
    """All experts run on x times the gate; where the gate is zero the expert sees zeros (no biases: a zero row)."""

    def mix(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        gate = x.new_zeros(x.shape[0], self.num_experts).scatter(1, ids, weights)
        scaled = x.unsqueeze(0) * gate.T.unsqueeze(-1)
        h = F.silu(torch.bmm(scaled, self.w1.transpose(1, 2))) * torch.bmm(scaled, self.w3.transpose(1, 2))
        return torch.bmm(h, self.w2.transpose(1, 2)).sum(0)


@case("weights.on_input_dense_bias", decoy=_dense_output_scaled)
class OnInputDenseBias(DenseAll):
    """As above with biases: an expert that was not picked still adds its constant."""

    def __init__(self) -> None:
        super().__init__(body="gelu")

    def mix(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        gate = x.new_zeros(x.shape[0], self.num_experts).scatter(1, ids, weights)
        scaled = x.unsqueeze(0) * gate.T.unsqueeze(-1)
        h = F.gelu(torch.bmm(scaled, self.w1.transpose(1, 2)) + self.b1[:, None])
        return (torch.bmm(h, self.w2.transpose(1, 2)) + self.b2[:, None]).sum(0)


@case("weights.temperature_buffer", decoy=naive)
class TemperatureBuffer(LoopList):
    """A learned temperature in a buffer that is rewritten after compiling."""

    temperature: Tensor

    def build_router(self) -> None:
        super().build_router()
        self.register_buffer("temperature", torch.tensor(3.0))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        top, ids = self.router(x).topk(self.top_k)
        return (top / self.temperature).softmax(-1), ids


@case("weights.half_precision_router")
class HalfPrecisionRouter(LoopList):
    """Weights rounded to bfloat16 on the way: a router computed in float32 instead is off by 1e-3."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.router(x).softmax(-1).topk(self.top_k)
        return (weights / weights.sum(-1, keepdim=True)).bfloat16().to(x.dtype), ids
