"""ONNX Runtime sessions: made from models or files, and run on torch tensors."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch

# A protobuf message holds at most 2 GB; above this a model goes through a file with its weights beside it.
MOST_BYTES = 1_500_000_000


def session(
    model: Any,
    *,
    threads: int | None = None,
    spinning: bool = False,
    providers: Sequence[Any] = ("CPUExecutionProvider",),
) -> Any:
    """An inference session of an onnx-ir model, or of a file.

    Its threads wait by `spinning` only on request: beside torch's own threads, that took up to five times as long.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    if threads is not None:
        options.intra_op_num_threads = threads
    if isinstance(model, str | Path):
        return onnxruntime.InferenceSession(str(model), options, providers=list(providers))
    if weight_bytes(model) <= MOST_BYTES:
        serialized = ir.to_proto(model).SerializeToString()
        return onnxruntime.InferenceSession(serialized, options, providers=list(providers))
    with tempfile.TemporaryDirectory(prefix="moec-") as folder:
        path = Path(folder) / "model.onnx"
        ir.save(model, path, external_data="model.onnx.data")
        return onnxruntime.InferenceSession(str(path), options, providers=list(providers))


def weight_bytes(model: Any) -> int:
    """The bytes of all initializers."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def as_array(tensor: torch.Tensor) -> Any:
    """A tensor on the CPU as numpy's, without a copy where it is contiguous."""
    return tensor.detach().contiguous().numpy()


def run(session: Any, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Results for inputs in the session's order, as torch tensors."""
    names = [one.name for one in session.get_inputs()]
    found = session.run(None, dict(zip(names, map(as_array, inputs), strict=True)))
    return [torch.from_numpy(np.ascontiguousarray(one)) for one in found]
