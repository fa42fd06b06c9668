"""`MoE` nodes with a third matrix, which ONNX Runtime does not run on the CPU, as the plain ops of their documentation.

fc1 is the gate and fc3 the up projection: fc2(act(fc1 x) * (fc3 x)). transformers' exporter writes them for CUDA.

T tokens, K experts per token, E experts, D model width, F expert width.
"""

from __future__ import annotations

from typing import Any

from onnx_ir.passes import common

from moec.backends.onnx.emitter import DTYPES, Emitter
from moec.errors import MoecError
from moec.exporter.insert import put_before
from moec.frontends.onnx.moe_ops import MATRICES, MoeNode, moe_nodes

CHECKED_AS = (
    "a copy of the original with the plain ops of their documentation in the place of MoE nodes with a third matrix, "
    "which ONNX Runtime does not run on the CPU"
)
# gelu is left out: whether it is the exact one the documentation does not say.
PLAIN = ("silu", "relu", "identity")
_NAMES = {str(int(kind)): name for name, kind in DTYPES.items()}


def write_out(model: Any, path: Any) -> list[Any]:
    """Replace each such node in place; the product with fc2 of each. Raises MOEC707 for one that is not understood."""
    found = []
    for one in moe_nodes(model.graph.all_nodes()):
        if one.operand(MATRICES[one.node.op_type][2]) is not None:
            why = _why_not(one) if one.node.graph is model.graph else "it is in a graph of another node"
            if why:
                what = f"{path} cannot be read: {one.name} is a {one.node.op_type} with a third matrix, which ONNX "
                raise MoecError("MOEC707", f"{what}Runtime does not run on the CPU, and {why}")
            found.append(_replace(model.graph, one))
    if found:
        common.ShapeInferencePass()(model)
    return found


def _why_not(one: MoeNode) -> str:
    """Why its documentation does not say what it computes; empty if it does."""
    if one.node.op_type != "MoE":
        return "moec reads it with unquantized weights alone"
    if one.number("use_sparse_mixer", 0):
        return "it asks for use_sparse_mixer"
    if one.number("swiglu_fusion", 0):
        return "it asks for swiglu_fusion as well"
    kind = _activation(one)
    if kind not in (*PLAIN, "swiglu"):
        return f"its documentation does not say which {kind} it computes"
    if any(value is None or value.dtype is None or str(int(value.dtype)) not in _NAMES for value in one.values[:2]):
        return "the types of its inputs are not known"
    return (
        "" if all(_shape(one.operand(place)) for place in MATRICES["MoE"]) else "the sizes of its weights are not known"
    )


def _shape(value: Any) -> tuple[int, ...]:
    sizes = tuple(value.shape) if value is not None and value.shape is not None else ()
    return sizes if len(sizes) == 3 and all(isinstance(size, int) for size in sizes) else ()


def _activation(one: MoeNode) -> str:
    attribute = one.node.attributes.get("activation_type")
    return "relu" if attribute is None else str(attribute.as_string())


def _replace(graph: Any, one: MoeNode) -> Any:
    emit = Emitter(f"{one.name}/written_out")
    x, logits, y = one.values
    dtype = _NAMES[str(int(x.dtype))]
    experts, _, width = _shape(one.operand(2))
    rows = emit.reshape(x, -1, width)
    gates = _gates(emit, one, logits, experts, dtype)
    a = _activated(emit, one, _product(emit, one, rows, 2), _product(emit, one, rows, 6), dtype)
    each = _product(emit, one, a, 4)
    weights = emit.op("Unsqueeze", emit.op("Transpose", gates, perm=[1, 0]), emit.ints(2))
    total = emit.op("ReduceSum", emit.op("Mul", each, weights), emit.ints(0), keepdims=0, name="sum_over_experts")
    found = emit.op("Reshape", total, emit.op("Shape", x), allowzero=1, name="result")
    put_before(graph, one.node, emit)
    found.shape, found.type = y.shape, y.type or x.type
    y.replace_all_uses_with(found, replace_graph_outputs=True)
    graph.remove(one.node, safe=True)
    return each


def _gates(emit: Emitter, one: MoeNode, logits: Any, experts: int, dtype: str) -> Any:
    """logits[T, E] -> the weight of each expert for each token, 0 where it was not chosen, [T, E]."""
    k = emit.ints(one.router.k)
    wide = emit.reshape(logits, -1, experts)
    wide = wide if _NAMES[str(int(logits.dtype))] == "f32" else emit.cast(wide, "f32")
    if one.router.normalize:
        best, ids = emit.op_many("TopK", 2, wide, k, axis=1, name="chosen")
        weights = emit.op("Softmax", best, axis=1)
    else:
        weights, ids = emit.op_many("TopK", 2, emit.op("Softmax", wide, axis=1), k, axis=1, name="chosen")
    none = emit.op("Expand", emit.scalar(0, "f32"), emit.op("Shape", wide))
    gates = emit.op("ScatterElements", none, ids, weights, axis=1, name="gates")
    return gates if dtype == "f32" else emit.cast(gates, dtype)


def _product(emit: Emitter, one: MoeNode, rows: Any, place: int) -> Any:
    """[T, C] or [E, T, C] times the node's matrices [E, N, C] and plus their biases [E, N] -> [E, T, N]."""
    turned = emit.op("Transpose", one.operand(place), perm=[0, 2, 1])
    found = emit.op("MatMul", rows, turned, name=f"fc{place // 2}")
    bias = one.operand(place + 1)
    return found if bias is None else emit.op("Add", found, emit.op("Unsqueeze", bias, emit.ints(1)))


def _activated(emit: Emitter, one: MoeNode, gate: Any, up: Any, dtype: str) -> Any:
    kind = _activation(one)
    if kind == "swiglu":
        limit = one.number("swiglu_limit", float("inf"))
        if limit != float("inf"):
            most, least = emit.scalar(limit, dtype), emit.scalar(-limit, dtype)
            gate, up = emit.op("Min", gate, most), emit.op("Clip", up, least, most)
        inner = emit.op("Mul", gate, emit.scalar(one.number("activation_alpha", 1.0), dtype))
        up = emit.op("Add", up, emit.scalar(one.number("activation_beta", 0.0), dtype))
        return emit.op("Mul", emit.op("Mul", gate, emit.op("Sigmoid", inner)), up)
    if kind == "silu":
        gate = emit.op("Mul", gate, emit.op("Sigmoid", gate))
    elif kind == "relu":
        gate = emit.op("Relu", gate)
    return emit.op("Mul", gate, up)
