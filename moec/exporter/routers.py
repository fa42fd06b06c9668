"""Routers that ONNX Runtime's MoE and QMoE have inside, proved from the nodes of a graph.

That is a softmax over the experts, the K largest, and perhaps a division by their sum.

T tokens, K experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from moec.exporter.facts import divided_by_its_sum, is_last, same_last_size, through

_SHAPES = ("Identity", "Reshape")
_SMALLER = ("FLOAT16", "BFLOAT16")


@dataclass(frozen=True)
class SoftmaxRouter:
    """The logits that a choice of experts is made by, and whether a token's weights are divided by their sum."""

    logits: Any
    """[..., E], in the element type that it was computed in."""
    normalize: bool


def router_of(ids: Any, weights: Any | None, experts: int, dtype: str) -> SoftmaxRouter | None:
    """The router that gives ids[T, K] and weights[T, K], if the graph proves it to be one; `dtype` is that of x.

    What lies between is held to fp32, so that a choice between near ties is not rounded another way.
    """
    found = through(ids)
    top = found.producer()
    if weights is None or top is None or top.op_type != "TopK" or found is not top.outputs[1] or not _largest(top):
        return None
    scores = _exact(top.inputs[0])
    if scores.shape is None or not len(scores.shape) or scores.shape[-1] != experts:
        return None
    shares, normalize = _exact(weights, (dtype,)), False
    divided = divided_by_its_sum(shares)
    if divided is not None:
        shares, normalize = _exact(divided, (dtype,)), True
    logits = _softmax(scores)
    if logits is not None and _is_choice(shares, top):
        return SoftmaxRouter(_unwidened(logits), normalize)
    among_chosen = _softmax(shares)
    if among_chosen is not None and _is_choice(_exact(among_chosen), top):
        return SoftmaxRouter(_unwidened(scores), True)
    chances = _gathered(shares, found)
    logits = None if chances is None else _softmax(chances)
    if logits is not None and _unwidened(logits) is _unwidened(scores):
        return SoftmaxRouter(_unwidened(scores), normalize)
    return None


def _largest(top: Any) -> bool:
    largest = top.attributes.get("largest")
    return (largest is None or largest.as_int() == 1) and is_last(top.attributes.get("axis"), top.inputs[0], default=-1)


def _exact(value: Any, to: Collection[str] = ()) -> Any:
    """Where a value comes from, but for its shape and for casts to fp32 or to one of these types."""
    node = value.producer()
    while node is not None and node.domain == "":
        if node.op_type == "Cast":
            kinds = {"f16": "FLOAT16", "bf16": "BFLOAT16", "f64": "DOUBLE"}
            if value.dtype is None or value.dtype.name not in {"FLOAT", *(kinds.get(one, "") for one in to)}:
                return value
        elif node.op_type not in _SHAPES or not same_last_size(value, node.inputs[0]):
            return value
        value = node.inputs[0]
        node = value.producer()
    return value


def _softmax(value: Any) -> Any | None:
    """What the value is a softmax of, over the last size and in fp32."""
    value = _exact(value)
    node = value.producer()
    if node is None or node.domain != "" or node.op_type != "Softmax":
        return None
    last = is_last(node.attributes.get("axis"), value, default=-1)
    return node.inputs[0] if last and value.dtype is not None and value.dtype.name == "FLOAT" else None


def _is_choice(value: Any, top: Any) -> bool:
    """Whether these are the elements that a TopK chose."""
    if value is top.outputs[0]:
        return True
    scores = _gathered(value, top.outputs[1])
    return scores is not None and _exact(scores) is _exact(top.inputs[0])


def _gathered(value: Any, ids: Any) -> Any | None:
    """Of what the value holds the elements at these places of the last size."""
    node = value.producer()
    if node is None or node.domain != "" or node.op_type != "GatherElements" or through(node.inputs[1]) is not ids:
        return None
    return node.inputs[0] if is_last(node.attributes.get("axis"), value, default=0) else None


def _unwidened(value: Any) -> Any:
    """The value before casts to fp32 from a smaller type, and before reshapes around them."""
    best, node = value, value.producer()
    while node is not None and node.domain == "" and (node.op_type == "Cast" or node.op_type in _SHAPES):
        before = node.inputs[0]
        if node.op_type == "Cast" and (before.dtype is None or before.dtype.name not in ("FLOAT", *_SMALLER)):
            break
        if value.dtype is None or value.dtype.name != "FLOAT" or not same_last_size(value, before):
            break
        value = best = before
        node = value.producer()
    return best
