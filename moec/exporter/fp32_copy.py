"""A graph with every value of 16 bits in fp32: what a file in bf16 says, where nothing runs it as it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

LOW = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)
# Attributes that name an element type.
TYPED = ("to", "dtype")


def in_fp32(model: Any) -> Any:
    """A copy; weights are widened one by one as they are read, and none is held."""
    copy = model.clone()
    for value in copy.graph.initializers.values():
        value.const_value = _tensor(value.const_value)
    values = [*copy.graph.inputs, *copy.graph.initializers.values()]
    values += [output for node in copy.graph.all_nodes() for output in node.outputs]
    for value in values:
        if value.dtype in LOW:
            value.type = ir.TensorType(ir.DataType.FLOAT)  # a new one: copies share theirs
    for node in copy.graph.all_nodes():
        for attribute in [*node.attributes.values()]:
            _widen(node, attribute)
    return copy


def _widen(node: Any, attribute: Any) -> None:
    if attribute.name in TYPED and attribute.type == ir.AttributeType.INT and attribute.as_int() in LOW:
        node.attributes[attribute.name] = ir.AttrInt64(attribute.name, int(ir.DataType.FLOAT))
    elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in LOW:
        node.attributes[attribute.name] = ir.AttrTensor(attribute.name, _tensor(attribute.as_tensor()))


def _tensor(tensor: Any) -> Any:
    if tensor.dtype not in LOW:
        return tensor
    return ir.LazyTensor(
        lambda: ir.Tensor(tensor.numpy().astype(np.float32)), ir.DataType.FLOAT, tensor.shape, name=tensor.name
    )
