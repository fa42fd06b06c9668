"""Which of ONNX Runtime's execution providers work here."""

from __future__ import annotations

import contextlib
import io
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

from moec.errors import MoecError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def check_installed() -> None:
    """MOEC408 where both packages of ONNX Runtime are installed: they overwrite each other's files."""
    both = {name: _place(name) for name in ("onnxruntime", "onnxruntime-gpu")}
    if "" not in both.values() and len(set(both.values())) == 1:
        hint = "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'moec[onnx-gpu]' or 'moec[onnx]'"
        what = "onnxruntime and onnxruntime-gpu are both installed, and each overwrites files of the other"
        raise MoecError("MOEC408", what, where=next(iter(both.values())), hint=hint)


def _place(name: str) -> str:
    """The folder that a package is installed in; empty where it is not."""
    try:
        return str(distribution(name).locate_file(""))
    except PackageNotFoundError:
        return ""


@cache
def why_no_cuda() -> str:
    """Why the CUDA provider cannot be used in this process; empty if it can."""
    import numpy as np
    import onnx_ir as ir
    import onnxruntime

    if CUDA not in onnxruntime.get_available_providers():
        return f"onnxruntime {onnxruntime.__version__} has no CUDA provider (pip install 'moec[onnx-gpu]')"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
        onnxruntime.preload_dlls()
    x = ir.Value(name="x", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Abs", [x])
    y = node.outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape([1]), ir.TensorType(ir.DataType.FLOAT)
    model = ir.Model(ir.Graph([x], [y], nodes=[node], opset_imports={"": 18}, name="probe"), ir_version=9)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        made = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=[CUDA, CPU])
        made.run(None, {"x": np.ones(1, np.float32)})
    except Exception as error:  # ONNX Runtime's errors have no common class
        return str(error).strip().splitlines()[0][:200]
    if CUDA in made.get_providers():
        return ""
    return "the CUDA provider does not load: a GPU, CUDA's libraries (cublas, cudart, curand) or its driver are missing"


def fast_providers(target: str) -> tuple[Any, ...]:
    """What files for a target are timed and run on here, as ONNX Runtime sets them up by itself."""
    return (CUDA, CPU) if target == "cuda" and not why_no_cuda() else (CPU,)


def providers_of(target: str) -> tuple[Any, ...]:
    """What files for a target are checked on here: in full fp32, which the CUDA provider rounds by itself."""
    return ((CUDA, {"use_tf32": "0"}), CPU) if target == "cuda" and not why_no_cuda() else (CPU,)
