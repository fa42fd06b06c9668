"""Types and sizes of a graph's values, where they follow from its inputs."""

from __future__ import annotations

import logging
from typing import Any

from moec.frontends.onnx.graphs import graphs_of


def infer_shapes(model: Any) -> None:
    """Fill them in, in place. What ONNX cannot infer, such as types its own ops do not take, is left as it is."""
    from onnx_ir.passes import common

    logger = logging.getLogger("onnx_ir.passes.common.shape_inference")
    before = logger.disabled
    logger.disabled = True  # it prints a traceback, and ONNX Runtime will say what is wrong
    try:
        common.ShapeInferencePass()(model)
    finally:
        logger.disabled = before
    _name_sequences(model.graph)


SEQUENCES = ("SequenceConstruct", "SequenceEmpty", "SequenceInsert", "SequenceErase", "SplitToSequence", "SequenceMap")


def _name_sequences(graph: Any) -> None:
    """Sequences of tensors, which onnx-ir takes for tensors when it infers their types."""
    import onnx_ir as ir

    for node in graph:
        inner = graphs_of(node)
        for one in inner:
            _name_sequences(one)
        for place, value in enumerate(node.outputs):
            if isinstance(value.type, ir.TensorType) and _is_sequence(node, inner, place):
                value.type, value.shape = ir.SequenceType(value.type), None


def _is_sequence(node: Any, inner: list[Any], place: int) -> bool:
    import onnx_ir as ir

    if node.op_type in SEQUENCES:
        return bool(node.domain == "")
    same = {"Identity": node.inputs[:1], "If": [one.outputs[place] for one in inner]}.get(node.op_type, [])
    if node.op_type == "Loop" and place + 1 < len(inner[0].outputs):
        same = inner[0].outputs[place + 1 : place + 2]
    return any(value is not None and isinstance(value.type, ir.SequenceType) for value in same)
