"""Regions run through the reference back end on random weights, tokens and routing. T tokens, K choices, E experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from moec.backendbase import load_backend
from moec.backends.reference.backend import Reference
from moec.ir import Region, Tensor
from moec.weights import View, WeightStore

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True)
class Inputs:
    """What a layer is called with; experts and weights are absent for a dense FFN."""

    x: torch.Tensor
    experts: torch.Tensor | None = None
    weights: torch.Tensor | None = None

    @property
    def all(self) -> tuple[torch.Tensor, ...]:
        return tuple(tensor for tensor in (self.x, self.experts, self.weights) if tensor is not None)


def random_weights(region: Region, seed: int = 0) -> dict[str, torch.Tensor]:
    """A tensor for each weight of the region; some rows are zero, some large."""
    torch.manual_seed(seed)
    weights = {}
    for ref, kind in region.weights.items():
        made = torch.randn(kind.evaluate({})) / 2
        if made.ndim > 1:
            made[..., 0, :] *= 10
            made[..., -1, :] = 0
        weights[ref] = made.to(DTYPES[kind.dtype])
    return weights


def in_whole_numbers(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Small whole numbers instead, with which products and sums are exact in any order."""
    return {ref: tensor.round().clamp(-4, 4) for ref, tensor in tensors.items()}


def random_inputs(region: Region, tokens: int, *, seed: int = 0, hot: bool = False, strangers: bool = False) -> Inputs:
    """Different experts for each token. `hot` prefers the first ones, so that the last stay empty; `strangers` puts
    ids that no expert has in some places."""
    torch.manual_seed(seed)
    types = {value.name: value.type for value in region.inputs}
    x = torch.randn(tokens, _size(types["x"], 1)).to(DTYPES[types["x"].dtype]) * 2
    if "experts" not in types:
        return Inputs(x)
    k, e = _size(types["experts"], 1), next(_size(kind, 0) for kind in region.weights.values() if kind.rank == 3)
    liking = torch.rand(tokens, e) - (torch.arange(e) * 0.4 if hot else 0)
    experts = liking.argsort(dim=1, descending=True)[:, :k].to(torch.int32)
    if strangers:
        experts[torch.rand(tokens, k) < 0.3] = e
    return Inputs(x, experts, torch.randn(tokens, k))


def execute(
    region: Region, weights: Mapping[str, torch.Tensor], inputs: Inputs, *, by_meaning: bool = False
) -> tuple[torch.Tensor, ...]:
    """The region's outputs as the reference back end computes them; `by_meaning` without its faster ways."""
    module = nn.Module()
    views: dict[str, View | tuple[View, ...]] = {}
    for number, (ref, tensor) in enumerate(weights.items()):
        name = f"p{number}"
        module.register_parameter(name, nn.Parameter(tensor.clone(), requires_grad=False))
        views[ref] = _views(ref, name, tensor)
    backend = Reference() if by_meaning else load_backend("reference")
    executable = backend.build(region, WeightStore(module, views), {})
    with torch.no_grad():
        return executable(*inputs.all)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected|| in f64; 0 where both are empty or zero."""
    difference = (found.double() - expected.double()).norm()
    scale = expected.double().norm()
    return float(difference / scale) if scale > 0 else float(difference)


def _views(ref: str, name: str, tensor: torch.Tensor) -> View | tuple[View, ...]:
    """Layers of these tests have matrices [E, N, C] and biases [E, N] of experts; all else is one tensor."""
    if tensor.ndim == 3 or (tensor.ndim == 2 and ref.endswith("_bias")):
        step, shape, stride = tensor.stride(0), tuple(tensor.shape[1:]), tuple(tensor.stride()[1:])
        return tuple(View(name, expert * step, shape, stride) for expert in range(tensor.shape[0]))
    return View(name, 0, tuple(tensor.shape), tuple(tensor.stride()))


def _size(kind: Tensor, axis: int) -> int:
    size = kind.shape[axis].constant
    assert size is not None
    return size
