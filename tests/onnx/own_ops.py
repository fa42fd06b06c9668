"""Files with ONNX Runtime's own MoE and QMoE nodes. T tokens, E experts, D model width, F expert width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

T, E, D, F = 6, 4, 32, 32


def moe_file(
    path: Path, *, gated: bool = False, bits: int = 0, block: int = 0, sequences: bool = False, **attributes: Any
) -> Path:
    """x[T, D], of `sequences` x[B, S, D] -> logits -> MoE or QMoE (`bits` 4 or 8) -> y, and it may run in place."""
    random = np.random.default_rng(0)
    tensors = {
        "gate": random.standard_normal((D, E)).astype(np.float32) / 3,
        "flat": np.array([-1, E], np.int64),
        "zero": np.zeros(1, np.float32),
        "b1": random.standard_normal((E, F * (1 + gated))).astype(np.float32) / 5,
        "b2": random.standard_normal((E, D)).astype(np.float32) / 5,
    }
    for name, shape in (("w1", (E, F * (1 + gated), D)), ("w2", (E, D, F))):
        weight = random.standard_normal(shape).astype(np.float32) / 6
        if bits:
            tensors["q" + name], tensors["s" + name] = quantized(weight, bits, block)
        else:
            tensors[name] = weight
    if bits:
        inputs = ["a", "logits", "qw1", "sw1", "b1", "qw2", "sw2", "b2"]
        attributes |= {"expert_weight_bits": bits, **({"block_size": block} if block else {})}
    else:
        inputs = ["a", "logits", "w1", "b1", "w2", "b2"]
    if gated:
        attributes |= {"activation_type": "swiglu", "swiglu_fusion": 1}
    kind = "QMoE" if bits else "MoE"
    nodes = [
        helper.make_node("Add", ["x", "zero"], ["a"], name="in"),
        helper.make_node("MatMul", ["a", "gate"], ["scores"], name="router"),
        helper.make_node("Reshape", ["scores", "flat"], ["logits"], name="flat"),
        helper.make_node(kind, inputs, ["m"], name="experts", domain="com.microsoft", k=2, **attributes),
        helper.make_node("Add", ["m", "zero"], ["y"], name="out"),
    ]
    sizes = ["batch", "sequence", D] if sequences else ["tokens", D]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, sizes)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, sizes)],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def quantized(weight: np.ndarray[Any, Any], bits: int, block: int) -> tuple[Any, Any]:
    """w[E, N, C] as uint8 around its middle, the lower nibble first, with a scale for each row or block."""
    blocks = weight.reshape(*weight.shape[:2], -1, block or weight.shape[-1])
    middle = 2 ** (bits - 1)
    scale = np.abs(blocks).max(-1) / (middle - 1)
    q = (np.round(blocks / scale[..., None]) + middle).astype(np.uint8).reshape(weight.shape)
    q = q if bits == 8 else q[..., 0::2] | q[..., 1::2] << 4
    return q, (scale if block else scale[..., 0]).astype(np.float32)
