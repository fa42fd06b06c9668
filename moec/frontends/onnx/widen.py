"""A model that computes in bf16 as one that computes in fp32: ONNX Runtime's CPU has hardly an op for bf16."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx_ir as ir

from moec.frontends.onnx.graphs import with_inner
from moec.frontends.onnx.shapes import infer_shapes

# Attributes that hold a type.
TYPES = ("to", "dtype", "output_dtype", "stash_type", "softmax_precision", "qk_matmul_output_mode_dtype")
BF16, F32 = ir.DataType.BFLOAT16, ir.DataType.FLOAT


def computes_in_bf16(model: Any) -> bool:
    """Whether any value that is computed, or comes in, has this type."""
    values = (*model.graph.inputs, *(value for node in with_inner(model.graph) for value in node.outputs))
    return any(value.dtype == BF16 for value in values)


def widen(model: Any) -> None:
    """Inputs, weights, values and outputs in bf16 become fp32, in place; weights are read when they are needed."""
    for value in _values(model):
        if value.const_value is not None and value.const_value.dtype == BF16:
            value.const_value = _widened(value.const_value)
        if value.dtype == BF16:
            value.type = ir.TensorType(F32)
    for node in with_inner(model.graph):
        for name, attribute in list(node.attributes.items()):
            if name in TYPES and attribute.type == ir.AttributeType.INT and attribute.as_int() == BF16:
                node.attributes[name] = ir.AttrInt64(name, int(F32))
            elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == BF16:
                node.attributes[name] = ir.AttrTensor(name, _widened(attribute.as_tensor()))
    infer_shapes(model)


def _values(model: Any) -> Iterator[Any]:
    for graph in model.graphs():
        yield from graph.inputs
        yield from graph.initializers.values()
        yield from graph.outputs
        for node in graph:
            yield from node.outputs


def _widened(tensor: Any) -> Any:
    def make() -> Any:
        return ir.tensor(tensor.numpy().astype("float32"), name=tensor.name)

    return ir.LazyTensor(make, F32, tensor.shape, name=tensor.name)
