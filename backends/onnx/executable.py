"""A region that runs in ONNX Runtime, on the CPU or a GPU, from and into torch's own memory."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from threading import Lock
from typing import Any

import onnxruntime
import torch

from moec.backendbase import Weights
from moec.backends.onnx.bound import run_bound
from moec.backends.onnx.lower import held_weights, region_model
from moec.backends.onnx.providers import CPU, CUDA
from moec.backends.onnx.runtime import session, weight_bytes
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
        device = inputs[0].device if inputs else torch.device("cpu")
        outputs = [
            torch.empty(value.type.evaluate(sizes), dtype=TORCH_DTYPES[value.type.dtype], device=device)
            for value in self._region.outputs
        ]
        given = [
            (value.name, x.detach().to(TORCH_DTYPES[value.type.dtype]).contiguous())
            for value, x in zip(self._region.inputs, inputs, strict=True)
        ]
        names = [f"out:{value.name}" for value in self._region.outputs]
        run_bound(held.session, given, list(zip(names, outputs, strict=True)))
        return tuple(outputs)

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
        where = "the GPU" if CUDA in held.session.get_providers() else "the CPU"
        return f"ONNX Runtime {onnxruntime.__version__} on {where}: {listed}\n{copy}"

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

    def _providers(self) -> list[Any]:
        """CUDA's on the GPU that holds the weights, with fp32 left whole."""
        held = [weight[0] for weight in held_weights(self._region, self._store).values() if len(weight)]
        gpus = sorted(weight.device.index or 0 for weight in held if weight.device.type == "cuda")
        return [(CUDA, {"device_id": str(gpus[0]), "use_tf32": "0"}), CPU] if gpus else [CPU]

    def _make(self) -> Held:
        # Read first: a write during the copying then shows as another version on the next call.
        version = self._store.version()
        model = region_model(self._region, self._store)
        made = session(model, threads=torch.get_num_threads(), providers=self._providers())
        return Held(version, made, weight_bytes(model), tuple(node.op_type for node in model.graph))
