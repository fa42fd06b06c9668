"""Adversarial combination: what happens to the experts' rows on their way into the result."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.corpus.blocks import DenseAll, Gathered, LoopList, LoopStacked, Sorted, Swiglu, naive
from tests.corpus.case import case
from tests.corpus.weights import sum_weighted


def _added(m: Any, x: Tensor) -> Tensor:
    rows = x.reshape(-1, m.dim)
    return sum_weighted(m, rows, *m.route(rows)).view_as(x)


@case("combine.overwrite", decoy=_added)
class Overwrite(LoopList):
    """`out[token] = ...` instead of adding: the expert with the highest index wins."""

    def mix(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            token, slot = torch.where(ids == e)
            if token.numel():
                out[token] = self.expert(e, x[token]) * weights[token, slot, None]
        return out


@case("combine.residual", decoy=_added)
class ResidualInside(LoopStacked):
    """The result starts from the input instead of zeros."""

    def mix(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = x.clone()
        for e in range(self.num_experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.expert(e, x[token]) * weights[token, slot, None])
        return out

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.dim)
        return self.mix(rows, *self.route(rows)).view_as(x)


@case("combine.shared_gate", others=1, decoy=naive)
class SharedWithGate(LoopList):
    """g * routed + (1 - g) * shared with a sigmoid gate of the token."""

    def build_experts(self) -> None:
        super().build_experts()
        self.shared = Swiglu(self.dim, self.hidden)
        self.blend = nn.Linear(self.dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        g = torch.sigmoid(self.blend(x))
        out: Tensor = g * super().forward(x) + (1 - g) * self.shared(x)
        return out


@case("combine.norm_after", decoy=naive)
class NormAfter(Sorted):
    """RMS normalisation of the mixture."""

    def build_experts(self) -> None:
        super().build_experts()
        self.norm_weight = nn.Parameter(torch.empty(self.dim))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return F.rms_norm(y, (self.dim,), self.norm_weight, 1e-6)


@case("combine.nan_to_num")
class NanToNum(LoopList):
    """`nan_to_num` on the mixture: the identity on every probe without a NaN."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nan_to_num(super().forward(x))


@case("combine.nan_to_num_input")
class NanToNumInput(LoopStacked):
    """`nan_to_num` on what the experts see; the router still sees the NaN."""

    def mix(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return super().mix(torch.nan_to_num(x, nan=1.0), torch.nan_to_num(weights, nan=0.5), ids)


@case("combine.dropped_to_zero", decoy=_added)
class DroppedToZero(LoopList):
    """Tokens whose best probability is below 0.6 get zero."""

    def mix(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = super().mix(x, weights, ids)
        sure = self.router(x).softmax(-1).amax(-1) >= 0.6
        result: Tensor = out * sure[:, None]
        return result


@case("combine.dropped_to_identity", decoy=_added)
class DroppedToIdentity(LoopList):
    """Tokens whose best probability is below 0.6 pass through unchanged."""

    def mix(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        sure = self.router(x).softmax(-1).amax(-1) >= 0.6
        return torch.where(sure[:, None], super().mix(x, weights, ids), x)


@case("combine.dropped_never_run", decoy=_added)
class DroppedNeverRun(LoopStacked):
    """Unsure tokens are taken out before routing and keep zeros: experts run on a subset of the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.dim)
        sure = self.router(rows).softmax(-1).amax(-1) >= 0.6
        out = torch.zeros_like(rows)
        kept = rows[sure]
        if kept.shape[0]:
            out[sure] = self.mix(kept, *self.route(kept))
        return out.view_as(x)


@case("combine.mean", decoy=_added)
class MeanOfSlots(Gathered):
    """The mean over slots instead of the sum."""

    def mix(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return super().mix(x, weights, ids) / self.top_k

    def expert(self, e: int, rows: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(rows, self.w1[e])) * F.linear(rows, self.w3[e]), self.w2[e])


@case("combine.maximum", decoy=_added)
class MaximumOfSlots(LoopStacked):
    """The elementwise maximum over the slots instead of a sum."""

    def mix(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        slots = x.new_zeros(x.shape[0], self.top_k, self.dim)
        for e in range(self.num_experts):
            token, slot = torch.where(ids == e)
            slots[token, slot] = self.expert(e, x[token]) * weights[token, slot, None]
        return slots.amax(1)


@case("combine.log_mean_exp", decoy=_added)
class LogMeanExp(LoopStacked):
    """Experts are mixed in probability space: log of the weighted sum of exponentials."""

    def mix(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        slots = x.new_zeros(x.shape[0], self.top_k, self.dim)
        for e in range(self.num_experts):
            token, slot = torch.where(ids == e)
            slots[token, slot] = self.expert(e, x[token]) + weights[token, slot, None].log()
        return torch.logsumexp(slots, 1)


@case("combine.concatenate")
class Concatenated(Sorted):
    """The slots are concatenated, not summed: the result is [T, K * D]."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.dim)
        weights, ids = self.route(rows)
        parts = [super(Concatenated, self).mix(rows, self._only(weights, k), ids) for k in range(self.top_k)]
        return torch.cat(parts, -1).view(*x.shape[:-1], -1)

    def _only(self, weights: Tensor, slot: int) -> Tensor:
        return weights * F.one_hot(torch.tensor(slot), self.top_k).to(weights)


@case("combine.scaled_dense", decoy=naive)
class ScaledDense(DenseAll):
    """The mixture is scaled by a learned scalar and shifted by a learned vector."""

    def build_experts(self) -> None:
        super().build_experts()
        self.scale = nn.Parameter(torch.empty(1))
        self.shift = nn.Parameter(torch.empty(self.dim))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x) * self.scale + self.shift
        return out


@case("combine.feature_gate")
class FeatureGate(LoopStacked):
    """One router per half of the features: weights are [T, K, 2] and act on blocks of D."""

    def build_router(self) -> None:
        super().build_router()
        self.router_features = nn.Linear(self.dim, 2 * self.top_k)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.dim)
        _, ids = self.route(rows)
        halves = self.router_features(rows).view(-1, self.top_k, 2).sigmoid().repeat_interleave(self.dim // 2, 2)
        out = torch.zeros_like(rows)
        for e in range(self.num_experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.expert(e, rows[token]) * halves[token, slot])
        return out.view_as(x)
