"""Adversarial experts, second half: clamps, norms, statistics of the batch, and bodies of other depths."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.corpus.blocks import Gathered, LoopList, LoopStacked
from tests.corpus.case import case
from tests.corpus.experts import GeluExperts, straight, without_norm


@case("experts.clamp_at_50", decoy=straight, decoy_scale=60.0)
class ClampAt50(LoopStacked):
    """The gate is clamped at 50: invisible at unit scale."""

    def expert(self, e: int, rows: Tensor) -> Tensor:
        gate = F.linear(rows, self.w1[e]).clamp(max=50.0)
        return F.linear(F.silu(gate) * F.linear(rows, self.w3[e]), self.w2[e])


@case("experts.clamp_result", decoy=straight, decoy_scale=60.0)
class ClampResult(LoopStacked):
    """The expert's result is clamped at +-500 before weighting."""

    def expert(self, e: int, rows: Tensor) -> Tensor:
        return super().expert(e, rows).clamp(-500.0, 500.0)


@case("experts.input_clamp", decoy=straight, decoy_scale=60.0)
class ClampInput(LoopStacked):
    """The expert's input is clamped at +-55, which the router does not see."""

    def expert(self, e: int, rows: Tensor) -> Tensor:
        return super().expert(e, rows.clamp(-55, 55))


@case("experts.per_expert_norm", decoy=without_norm)
class PerExpertNorm(LoopList):
    """A LayerNorm with weights of its own after each expert."""

    def build_experts(self) -> None:
        super().build_experts()
        self.norms = nn.ModuleList(nn.LayerNorm(self.dim) for _ in range(self.num_experts))

    def expert(self, e: int, rows: Tensor) -> Tensor:
        out: Tensor = self.norms[e](self.experts[e](rows))
        return out


@case("experts.norm_first")
class NormFirst(Gathered):
    """RMS normalisation with a stacked [E, D] weight on each expert's input."""

    def build_experts(self) -> None:
        super().build_experts()
        self.norm_weight = nn.Parameter(torch.empty(self.num_experts, self.dim))

    def mix(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        unit = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        rows = unit[:, None] * self.norm_weight[ids]
        h = F.silu(torch.einsum("tkd,tkfd->tkf", rows, self.w1[ids])) * torch.einsum(
            "tkd,tkfd->tkf", rows, self.w3[ids]
        )
        return torch.einsum("tkf,tkdf,tk->td", h, self.w2[ids], weights)


@case("experts.batch_mean", expect="left alone", decoy=without_norm)
class BatchMean(LoopList):
    """Each expert subtracts the mean over the rows it got: a token's result depends on the others."""

    def expert(self, e: int, rows: Tensor) -> Tensor:
        return super().expert(e, rows - rows.mean(0, keepdim=True))


@case("experts.batch_norm", expect="either")
class BatchNormExperts(LoopList):
    """BatchNorm in the experts: in eval a fixed affine map from buffers, in training a batch statistic."""

    def build_experts(self) -> None:
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 16))
            for _ in range(self.num_experts)
        )

    def fill_(self, generator: torch.Generator) -> None:
        for part in self.modules():
            if isinstance(part, nn.BatchNorm1d):
                assert part.running_mean is not None
                assert part.running_var is not None
                part.running_mean.copy_(torch.randn(24, generator=generator))
                part.running_var.copy_(0.5 + torch.rand(24, generator=generator))


@case("experts.three_layers")
class ThreeLayers(LoopList):
    """Three Linears in each expert."""

    def build_experts(self) -> None:
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 16))
            for _ in range(self.num_experts)
        )


@case("experts.single_linear")
class SingleLinear(LoopList):
    """Each expert is one Linear: no activation at all."""

    def build_experts(self) -> None:
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(self.num_experts))


@case("experts.linear_chain")
class LinearChain(LoopList):
    """Two Linears without an activation (a low-rank expert)."""

    def build_experts(self) -> None:
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 4, bias=False), nn.Linear(4, 16)) for _ in range(self.num_experts)
        )


@case("experts.inner_residual")
class InnerResidual(GeluExperts):
    """Each expert adds its own input."""

    def expert(self, e: int, rows: Tensor) -> Tensor:
        return rows + super().expert(e, rows)


@case("experts.hooked")
class Hooked(GeluExperts):
    """A forward hook on expert 3 doubles its result."""

    def build_experts(self) -> None:
        super().build_experts()
        self.experts[3].register_forward_hook(lambda module, args, out: out * 2)
