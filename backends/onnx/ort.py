"""The ONNX Runtime back end as the rest of moec sees it."""

from __future__ import annotations

from collections.abc import Mapping

from moec.backendbase import Executable, OpaqueGraph, Weights
from moec.backends.onnx.executable import OrtExecutable
from moec.backends.onnx.table import unsupported
from moec.ir import Op, Region


class OnnxRuntime:
    """Runs regions in ONNX Runtime, on the CPU or a GPU, by the lowerings that `moec export` writes."""

    name = "onnxruntime"

    def supports(self, op: Op) -> str | None:
        """None where the op has a lowering, else the reason why not."""
        return unsupported(op)

    def build(
        self,
        region: Region,
        weights: Weights,
        opaques: Mapping[str, OpaqueGraph],
        *,
        pack: bool = False,
        graphs: bool = False,
    ) -> Executable:
        """The region over these weights. Raises what `verify` raises, MOEC403 and MOEC405.

        It always has its own copy of the weights, so `pack` changes nothing, and neither does `graphs`.
        """
        return OrtExecutable(region, weights)
