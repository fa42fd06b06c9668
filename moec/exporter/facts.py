"""What a graph proves about a router's results, from the nodes that compute them: needed by forms that rest on it.

T tokens, K experts per token, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

# Never below zero, whatever goes in.
_ABOVE = {"Softmax", "Sigmoid", "HardSigmoid", "Relu", "Abs", "Exp", "Softplus", "Sqrt", "ReduceSumSquare"}
_ABOVE |= {"ReduceL1", "ReduceL2"}
# Elements of the first input in another place.
_MOVES = {"Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Expand", "Tile", "Slice"}
_MOVES |= {"Gather", "GatherElements", "GatherND", "Split", "ReduceMax", "ReduceMin", "ReduceMean", "ReduceSum", "TopK"}
# Not below zero where none of their inputs is.
_TOGETHER = {"Add", "Mul", "Div", "Min", "Concat", "Sum", "Mean"}
DEEPEST = 60


@dataclass(frozen=True)
class Facts:
    """What is proved about experts[T, K] and weights[T, K]; False means unknown."""

    chosen: bool = False
    """Ids are distinct experts."""
    nonnegative: bool = False
    sums_to_one: bool = False


def facts_of(ids: Any, weights: Any | None, experts: int) -> Facts:
    """About a router's results in an onnx-ir graph; without weights they are all 1."""
    one = weights is not None and _sums_to_one(weights)
    return Facts(_chosen(ids, experts), weights is None or _nonnegative(weights, 0), one)


def _constant(value: Any) -> Any | None:
    """The elements, where they are known and few."""
    tensor = value.const_value
    node = value.producer()
    if tensor is None and node is not None and node.op_type in ("Constant", "ConstantOfShape"):
        attribute = node.attributes.get("value")
        tensor = attribute.as_tensor() if attribute is not None else None
        if tensor is None and node.op_type == "ConstantOfShape":
            return np.zeros(1)
    return tensor.numpy() if tensor is not None and tensor.size <= 100_000 else None


def _nonnegative(value: Any, depth: int) -> bool:
    known = _constant(value)
    if known is not None:
        return bool((known.astype(np.float64) >= 0).all())
    node = value.producer()
    if node is None or depth > DEEPEST or node.domain != "":
        return False
    if value.dtype is not None and value.dtype.name in ("BOOL", "UINT8"):
        return True
    if node.op_type == "TopK" and value is not node.outputs[0]:
        return True  # places
    rule = _rule(node)
    return rule is not None and all(_nonnegative(one, depth + 1) for one in rule)


def _rule(node: Any) -> list[Any] | None:
    """The inputs that must not be below zero for the result not to be; None where that is not enough."""
    inputs, kind = list(node.inputs), node.op_type
    if kind in _ABOVE or (kind == "Cast" and inputs[0].dtype is not None and inputs[0].dtype.name == "BOOL"):
        return []
    if kind in _MOVES:
        return inputs[:1]
    if kind == "Mul" and inputs[0] is inputs[1]:
        return []
    if kind in _TOGETHER:
        return inputs
    if kind == "Clip":
        return [inputs[0], *(one for one in inputs[2:] if one is not None)]
    if kind == "OneHot":
        return inputs[2:]  # the two numbers it is made of
    return {"Pow": inputs[:1], "Where": inputs[1:], "ScatterElements": [inputs[0], inputs[-1]]}.get(kind)


def through(value: Any) -> Any:
    """Where the value comes from, but for its width and shape: K stays the last size."""
    node = value.producer()
    while node is not None and node.domain == "" and node.op_type in ("Identity", "Cast", "Reshape"):
        if node.op_type == "Cast" and not _same_kind(value, node.inputs[0]):
            return value  # a bool or a whole number of what had a fraction is another number
        value = node.inputs[0]
        node = value.producer()
    return value


def _same_kind(a: Any, b: Any) -> bool:
    """Whether both are known to hold floating point numbers, or both whole ones."""
    if a.dtype is None or b.dtype is None:
        return False
    floats = [one.dtype.is_floating_point() for one in (a, b)]
    return floats[0] == floats[1] and "BOOL" not in (a.dtype.name, b.dtype.name)


def _sums_to_one(value: Any) -> bool:
    """Whether the last step is a softmax over a token's choices or a division by their sum, nothing added."""
    found = through(value)
    node = found.producer()
    if node is None or node.domain != "" or not same_last_size(value, found):
        return False
    if node.op_type == "Softmax":
        return is_last(node.attributes.get("axis"), found, default=-1)
    return divided_by_its_sum(found) is not None


def divided_by_its_sum(value: Any) -> Any | None:
    """What the value is, divided by its sum over the last size; None if that is not how it is computed."""
    node = value.producer()
    if node is None or node.domain != "" or node.op_type != "Div":
        return None
    total = through(node.inputs[1]).producer()
    if total is None or total.domain != "" or total.op_type != "ReduceSum":
        return None
    summed, share = total.inputs[0], node.inputs[0]
    # A reshape on the way may put several tokens into one sum, and another axis last.
    if through(summed) is not through(share) or not (summed is share or same_last_size(summed, share)):
        return None
    if not (node.inputs[1] is total.outputs[0] or same_last_size(node.inputs[1], total.outputs[0])):
        return None
    axes = _constant(total.inputs[1]) if len(total.inputs) > 1 and total.inputs[1] is not None else None
    kept = total.attributes.get("keepdims")
    rank = len(summed.shape) if summed.shape is not None else 0
    last = axes is not None and axes.tolist() in ([-1], [rank - 1])
    return share if last and (kept is None or kept.as_int() == 1) else None


def same_last_size(a: Any, b: Any) -> bool:
    """Whether both have a known last size, the same."""
    if a.shape is None or b.shape is None or not len(a.shape) or not len(b.shape):
        return False
    return isinstance(a.shape[-1], int) and a.shape[-1] == b.shape[-1]


def is_last(axis: Any, value: Any, default: int) -> bool:
    """Whether a node's axis attribute names the last size of the value."""
    found = default if axis is None else axis.as_int()
    return found in (-1, len(value.shape) - 1)


def _chosen(ids: Any, experts: int) -> bool:
    """Whether they are the places of a TopK over E scores."""
    found = through(ids)
    node = found.producer()
    if node is None or node.domain != "" or node.op_type != "TopK" or found is not node.outputs[1]:
        return False
    scores = node.inputs[0]
    rank = len(scores.shape) if scores.shape is not None else 0
    if not rank or scores.shape[-1] != experts or not is_last(node.attributes.get("axis"), scores, default=-1):
        return False
    return same_last_size(ids, found)
