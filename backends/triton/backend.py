"""The Triton back end as the rest of moec sees it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping

import torch

from moec.backendbase import Executable, OpaqueGraph, Weights
from moec.backends.reference.backend import Reference
from moec.backends.reference.fast import Fast
from moec.errors import MoecError
from moec.ir import DenseFfn, ExpertFfn, Op, Region
from moec.weights import WeightStore

OLDEST = (8, 0)
"""The least compute capability that the kernels are compiled for."""


def why_not(device: torch.device | None) -> str:
    """Why the kernels cannot run here, on this device or on any; empty if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreted():
        return ""
    if device is not None and device.type != "cuda":
        return f"the layer is on {device.type}"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.version.cuda is None:
        return "torch was built for another maker's GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        name = torch.cuda.get_device_name(device)
        found, least = (".".join(map(str, pair)) for pair in (capability, OLDEST))
        return f"{name} has compute capability {found}, the kernels need {least}"
    return ""


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: for tests."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


class Triton(Reference):
    """Runs fused ops by kernels on NVIDIA GPUs, and all other ops by their meaning."""

    name = "triton"

    def build(
        self,
        region: Region,
        weights: Weights,
        opaques: Mapping[str, OpaqueGraph],
        *,
        pack: bool = False,
        graphs: bool = False,
    ) -> Executable:
        """The region over these weights. Raises also MOEC408 where the kernels cannot run."""
        why = why_not(None)
        if why:
            hint = 'backend="auto" takes one that can'
            raise MoecError("MOEC408", f"the Triton back end cannot run: {why}", hint=hint)
        from moec.backends.triton.executable import TritonExecutable
        from moec.backends.triton.fused import TritonFused
        from moec.backends.triton.graphs import GraphedExecutable

        device = "cpu" if interpreted() else "cuda"

        def plan(op: Op) -> Fast | None:
            return TritonFused(op, device) if isinstance(op, ExpertFfn | DenseFfn) else None

        self.check(region, opaques)
        found = TritonExecutable(region, weights, opaques, pack=pack, plan=plan, device=device)
        return GraphedExecutable(found, region) if graphs else found

    def recording(self, region: Region, weights: WeightStore, *, absent: bool = False) -> Executable | str:
        """The region with gradients by kernels, part of the autograd graph; or why there are none for it."""
        from moec.backends.triton.fused import TritonFused
        from moec.backends.triton.recording import RecordingExecutable

        device = "cpu" if interpreted() else "cuda"

        def plan(op: Op) -> Fast | None:
            return TritonFused(op, device) if isinstance(op, ExpertFfn | DenseFfn) else None

        self.check(region, {})
        found = RecordingExecutable(region, weights, plan=plan, device=device, absent=absent)
        return found.why or found


def backend() -> Triton:
    """What `load_backend("triton")` gives."""
    return Triton()
