"""A region that runs in ONNX Runtime, on the CPU, from and into torch's own memory."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from threading import Lock
from typing import Any

import onnxruntime
import torch

from moec.backendbase import Weights
from moec.backends.onnx.emitter import DTYPES
from moec.backends.onnx.lower import region_model
from moec.backends.onnx.runtime import run, session, weight_bytes
from moec.backends.reference.dtypes import DTYPES as TORCH_DTYPES
from moec.backends.reference.inputs import Inputs
from moec.ir import Region


@dataclass(frozen=True)
class Held:
    """A session with its copy of the weights, and what the weights were like when it was made."""

    version: Hashable
    session: Any
    nbytes: int
    nodes: tuple[str, ...]


class OrtExecutable:
    """Runs a region. ONNX Runtime keeps its own copy of the weights, made anew when `weights.version()` changed."""

    def __init__(self, region: Region, weights: Weights) -> None:
        self._region, self._store = region, weights
        self._inputs = Inputs(region)
        self._lock = Lock()
        self._held = self._make()

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The region's outputs. Raises MOEC404 and MOEC109 for inputs that do not fit, MOEC405 for weights."""
        sizes = self._inputs.check(inputs)
        held = self._current()
        shapes = [value.type.evaluate(sizes) for value in self._region.outputs]
        outputs = [
            torch.empty(shape, dtype=TORCH_DTYPES[value.type.dtype])
            for value, shape in zip(self._region.outputs, shapes, strict=True)
        ]
        given = [
            x.detach().to(TORCH_DTYPES[value.type.dtype]).contiguous()
            for value, x in zip(self._region.inputs, inputs, strict=True)
        ]
        if all(tensor.numel() for tensor in (*given, *outputs)):
            self._run(held.session, given, outputs)
            return tuple(outputs)
        return self._run_empty(held.session, given, outputs)

    def _run(self, session: Any, given: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        binding = session.io_binding()
        for value, tensor in zip(self._region.inputs, given, strict=True):
            binding.bind_input(
                value.name, "cpu", 0, int(DTYPES[value.type.dtype]), tuple(tensor.shape), tensor.data_ptr()
            )
        for value, tensor in zip(self._region.outputs, outputs, strict=True):
            name, kind = f"out:{value.name}", int(DTYPES[value.type.dtype])
            binding.bind_output(name, "cpu", 0, kind, tuple(tensor.shape), tensor.data_ptr())
        session.run_with_iobinding(binding)

    def _run_empty(
        self, session: Any, given: list[torch.Tensor], outputs: list[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Without tokens: what has no elements has no address to bind."""
        if any(tensor.dtype == torch.bfloat16 for tensor in given):  # which numpy does not have
            return tuple(torch.zeros_like(output) for output in outputs)
        found = run(session, given)
        return tuple(one.to(output.dtype) for one, output in zip(found, outputs, strict=True))

    @property
    def nbytes_packed(self) -> int:
        """Bytes of ONNX Runtime's copy of the weights."""
        return self._held.nbytes

    def describe(self) -> str:
        """What the session holds."""
        held = self._held
        counts = {kind: held.nodes.count(kind) for kind in dict.fromkeys(held.nodes)}
        listed = ", ".join(f"{number} {kind}" for kind, number in counts.items())
        copy = f"a copy of {held.nbytes:,} bytes of weights, made anew when they change"
        return f"ONNX Runtime {onnxruntime.__version__} on the CPU: {listed}\n{copy}"

    def refresh(self) -> None:
        """Copy the weights anew, after writes that `weights.version()` does not see (`p.data`)."""
        with self._lock:
            self._held = self._make()

    def _current(self) -> Held:
        if self._held.version == self._store.version():
            return self._held
        with self._lock:
            if self._held.version != self._store.version():
                self._held = self._make()
            return self._held

    def _make(self) -> Held:
        # Read first: a write during the copying then shows as another version on the next call.
        version = self._store.version()
        model = region_model(self._region, self._store)
        made = session(model, threads=torch.get_num_threads())
        return Held(version, made, weight_bytes(model), tuple(node.op_type for node in model.graph))
