"""Layers in functions of an ONNX file, written with onnxscript. T tokens, K choices, E experts, D model width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxscript import opset20 as op
from onnxscript import script
from onnxscript.values import Opset

own = Opset("layers", 1)


@script(own, default_opset=op)
def routed(x, gate):  # type: ignore[no-untyped-def]
    """x[T, D], gate[D, E] -> weights[T, 2], experts[T, 2]."""
    best, chosen = op.TopK(op.MatMul(x, gate), op.Constant(value_ints=[2]), axis=-1)
    return op.Softmax(best, axis=-1), chosen


@script(own, default_opset=op)
def expert(rows, up, down):  # type: ignore[no-untyped-def]
    """rows[T, K, 1, D], up[T, K, D, F], down[T, K, F, D] -> [T, K, 1, D]."""
    return op.MatMul(op.Relu(op.MatMul(rows, up)), down)


@script(own, default_opset=op)
def layer(x, gate, up, down):  # type: ignore[no-untyped-def]
    """x[T, D] -> [T, D], by functions of its own."""
    weights, chosen = routed(x, gate)
    rows = op.Unsqueeze(x, op.Constant(value_ints=[1, 2]))
    y = expert(rows, op.Gather(up, chosen, axis=0), op.Gather(down, chosen, axis=0))
    y = op.Squeeze(y, op.Constant(value_ints=[2]))
    return op.ReduceSum(
        op.Mul(y, op.Unsqueeze(weights, op.Constant(value_ints=[2]))), op.Constant(value_ints=[1]), keepdims=0
    )


def functions(path: Path, *, weights: int = 2) -> Path:
    """x[T, 16] through one function twice, with `weights` sets of weights."""
    random = np.random.default_rng(0)
    shapes = {"gate": (16, 5), "up": (5, 16, 24), "down": (5, 24, 16)}
    tensors = {
        f"{name}.{i}": (random.standard_normal(shape) / 4).astype(np.float32)
        for i in range(weights)
        for name, shape in shapes.items()
    }

    def call(x: str, y: str, index: int) -> Any:
        held = [f"{name}.{index % weights}" for name in shapes]
        return helper.make_node("layer", [x, *held], [y], domain="layers", name=y)

    nodes = [call("x", "first", 0), helper.make_node("Add", ["x", "first"], ["h"]), call("h", "second", 1)]
    nodes.append(helper.make_node("Add", ["h", "second"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", 16])],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("layers", 1)]
    held = [one.to_function_proto() for one in (routed, expert, layer)]
    model = helper.make_model(graph, opset_imports=opsets, functions=held, ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path
