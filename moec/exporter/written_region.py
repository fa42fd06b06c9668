"""A region as it will be written, in ONNX Runtime, from and into torch's own memory. T tokens, D model width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moec.backendbase import Weights
from moec.backends.onnx.bound import run_bound
from moec.backends.onnx.form import Form
from moec.backends.onnx.lower import region_model
from moec.backends.onnx.providers import CPU
from moec.backends.onnx.runtime import session
from moec.backends.reference.dtypes import DTYPES
from moec.backends.reference.inputs import Inputs
from moec.exporter.prepare import widened
from moec.frontends.onnx.widen import in_fp32
from moec.ir import Region


class WrittenRegion:
    """Runs it as the session's providers do; where only the CPU's are here, `MoE` and `QMoE` in bf16 as copies in fp32,
    whose results are rounded."""

    def __init__(self, region: Region, weights: Weights, form: Form, providers: Sequence[Any]) -> None:
        """Raises what ONNX Runtime raises for a model that it does not load."""
        self._region, self._inputs = region, Inputs(region)
        model = region_model(region, weights, form=form)
        in_bf16 = any(value.type.dtype == "bf16" for value in region.inputs)
        self._copied = in_bf16 and form.experts != "sorted" and tuple(providers) == (CPU,)
        self._session = session(in_fp32(model) if self._copied else model, providers=providers)

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The region's outputs. Raises MOEC404 for inputs that do not fit, and what ONNX Runtime raises."""
        sizes = self._inputs.check(inputs)
        given, found = [], []
        for value, x in zip(self._region.inputs, inputs, strict=True):
            tensor = x.detach().to(DTYPES[value.type.dtype]).contiguous()
            given.append((value.name, widened(tensor) if self._copied else tensor))
        for value in self._region.outputs:
            tensor = torch.empty(value.type.evaluate(sizes), dtype=DTYPES[value.type.dtype])
            found.append((f"out:{value.name}", widened(tensor) if self._copied else tensor))
        run_bound(self._session, given, found)
        types = [DTYPES[value.type.dtype] for value in self._region.outputs]
        return tuple(tensor.to(dtype) for (_, tensor), dtype in zip(found, types, strict=True))
