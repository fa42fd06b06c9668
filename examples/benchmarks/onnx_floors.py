"""The least time that experts may take on this CPU: reading their weights, or their products at the best rate here.

T tokens, K experts per token, E experts, D model width, F expert width.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper


def sizes_of(layer: str) -> tuple[int, int, int, int]:
    """E, K, D and F."""
    found = re.fullmatch(r"E(\d+)k(\d+)D(\d+)F(\d+)", layer)
    assert found is not None, f"{layer!r} is no layer; write it like E8k2D1024F3584"
    experts, k, width, hidden = map(int, found.groups())
    return experts, k, width, hidden


@dataclass(frozen=True)
class Machine:
    """At best: bytes a second from memory, and operations a second in ONNX Runtime's products."""

    bandwidth: float
    exact: float
    int8: float

    def floor(self, layer: str, tokens: int, *, int8: bool) -> float:
        """Milliseconds that the experts of a layer take at least, at the experts that tokens hit on average."""
        experts, k, width, hidden = sizes_of(layer)
        weights = 3 * width * hidden
        hit = experts * (1 - (1 - k / experts) ** tokens)
        reading = hit * weights * (1 if int8 else 4) / self.bandwidth
        return 1e3 * max(reading, 2 * tokens * k * weights / (self.int8 if int8 else self.exact))


def best_here(threads: int) -> Machine:
    """Measured: the least time of several, sums over 256 MiB and products of 512 rows by 1024 by 4096."""
    numbers = np.ones(1 << 26, dtype=np.float32)
    torch.set_num_threads(threads)
    reading = torch.from_numpy(numbers)
    bandwidth = numbers.nbytes / _least(reading.sum)
    operations = 2 * 512 * 1024 * 4096
    found = []
    for kind in ("MatMul", "MatMulInteger"):
        x, w = (np.ones(shape, dtype=np.float32) for shape in ((512, 1024), (1024, 4096)))
        if kind == "MatMulInteger":
            x, w = x.astype(np.uint8), w.astype(np.int8)
        session = product(kind, x, w, threads)
        found.append(operations / _least(lambda s=session, x=x: s.run(None, {"x": x})))  # type: ignore[misc]
    return Machine(bandwidth, *found)


def product(kind: str, x: Any, w: Any, threads: int) -> Any:
    """A session of one product, x times a constant w."""
    element = helper.np_dtype_to_tensor_dtype
    out = TensorProto.FLOAT if kind == "MatMul" else TensorProto.INT32
    graph = helper.make_graph(
        [helper.make_node(kind, ["x", "w"], ["y"])],
        kind,
        [helper.make_tensor_value_info("x", element(x.dtype), x.shape)],
        [helper.make_tensor_value_info("y", out, (x.shape[0], w.shape[1]))],
        [numpy_helper.from_array(w, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _least(call: Callable[[], Any], count: int = 20) -> float:
    """Seconds of the fastest of these calls."""
    best = math.inf
    for _ in range(count):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
