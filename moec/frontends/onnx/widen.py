"""A model that computes in 16 bits as one that computes in fp32: ONNX Runtime's CPU has hardly an op for bf16."""

from __future__ import annotations

from collections.abc import Collection, Iterator
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
    _widen(model, (BF16,))
    infer_shapes(model)


def in_fp32(model: Any) -> Any:
    """A copy with everything of 16 bits in fp32; weights are widened one by one as they are read, and none is held."""
    copy = model.clone()
    _widen(copy, (BF16, ir.DataType.FLOAT16))
    return copy


def _widen(model: Any, low: Collection[Any]) -> None:
    for value in _values(model):
        if value.const_value is not None and value.const_value.dtype in low:
            value.const_value = _widened(value.const_value)
        if value.dtype in low:
            value.type = _wide_type(value.type)  # a new one: copies share theirs
    for node in with_inner(model.graph):
        for name, attribute in list(node.attributes.items()):
            if name in TYPES and attribute.type == ir.AttributeType.INT and attribute.as_int() in low:
                node.attributes[name] = ir.AttrInt64(name, int(F32))
            elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in low:
                node.attributes[name] = ir.AttrTensor(name, _widened(attribute.as_tensor()))


def _wide_type(type: Any) -> Any:
    """Also of a sequence, or of what may be missing."""
    return ir.TensorType(F32) if isinstance(type, ir.TensorType) else type.__class__(_wide_type(type.elem_type))


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
