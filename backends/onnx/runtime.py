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

# Above this a model goes through a file with its weights beside it, which ONNX Runtime maps instead of copying.
LARGE = 1 << 27


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
    folder_of_weights = _folder(model)
    if folder_of_weights:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder_of_weights)
        if not spinning:  # it checks, and is not timed: the weights of a large model are mapped and never copied
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.enable_cpu_mem_arena = False
    if folder_of_weights or weight_bytes(model) <= LARGE:
        serialized = ir.to_proto(model).SerializeToString()
        return onnxruntime.InferenceSession(serialized, options, providers=list(providers))
    with tempfile.TemporaryDirectory(prefix="moec-") as folder:
        path = Path(folder) / "model.onnx"
        ir.save(model, path, external_data="model.onnx.data")
        return onnxruntime.InferenceSession(str(path), options, providers=list(providers))


def _folder(model: Any) -> str:
    """The folder that some of the model's weights lie in; empty where all are in memory."""
    held = (value.const_value for value in model.graph.initializers.values())
    return next((str(one.base_dir) for one in held if isinstance(one, ir.ExternalTensor)), "")


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
