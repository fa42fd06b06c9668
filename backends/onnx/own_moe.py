"""A MoE layer as one node of ONNX Runtime's own MoE or QMoE, fed with logarithms of the router's weights or its logits.

Both ops take logits and choose experts themselves. With W[T, E] the weights that the router chose, the logits are
log W, renormalised inside the op, and W's sum is put back behind it: that serves any router whose weights are not
negative, and keeps clear of what the ops get wrong otherwise. A softmax router may be left to the op instead, which
saves a dozen small kernels.

T tokens, K experts per token, E experts, D model width, F expert width, N outputs, C inputs, B blocks of C.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from moec.backends.onnx.form import Form
from moec.backends.onnx.lowering import Lowering
from moec.backends.onnx.stacks import rounded_in_blocks, stacked
from moec.ir import ExpertFfn, Value

DOMAIN = "com.microsoft"
# A chosen expert of weight 0 stays above all that were not chosen, and neither is a denormal.
LEAST_CHOSEN, NOT_CHOSEN = 1e-30, 1e-37


def why_not(op: ExpertFfn, form: Form) -> str:
    """Why the node cannot say this op; empty if it can."""
    d, k = op.x.type.shape[1].constant, op.experts.type.shape[1].constant
    f = op.width(op.w_in).constant
    if d is None or k is None or f is None or op.w_in.type.shape[0].constant is None:
        return "its sizes are not known until it runs"
    if op.w_out.type.shape[1].constant != d:
        return f"the op gives as many columns as it takes, {d}, and the layer {op.w_out.type.shape[1]}"
    if op.scale_in is not None or op.scale_out is not None:
        return "it takes exact weights"
    if op.x.type.dtype not in ("f32", "f16", "bf16"):
        return f"it does not compute in {op.x.type.dtype}"
    if form.experts == "qmoe" and (d % form.block or f % form.block):
        return f"widths {d} and {f} are not whole blocks of {form.block}"
    return _why_not_activation(op)


def _why_not_activation(op: ExpertFfn) -> str:
    if op.layout == "none":
        plain = op.fn in ("relu", "identity") or (op.fn == "silu" and op.alpha == 1)
        return "" if plain and op.limit is None else f"it has no {op.fn}{' with a clamp' * (op.limit is not None)}"
    if op.fn not in ("silu", "quick_gelu") or op.clamp_after:
        return f"of gated activations it has silu alone, and this is {op.fn}{', clamped behind it' * op.clamp_after}"
    return ""


def expert_ffn(op: ExpertFfn, low: Lowering) -> Any:
    """The layer's result in x's element type."""
    emit, form = low.emit, low.form
    kind = "f16" if form.half else op.x.type.dtype
    experts, k = op.w_in.type.shape[0].constant or 0, op.experts.type.shape[1].constant or 0
    x = low.value(op.x)
    x = x if op.x.type.dtype == kind else emit.cast(x, kind)
    logits, normalize, sums = _routing(op, low, experts)
    inputs = [x, logits if low.routers or kind == "f32" else emit.cast(logits, kind), *_tensors(op, low, kind)]
    attributes: dict[str, Any] = {"k": k, "normalize_routing_weights": normalize, **_activation(op)}
    if form.experts == "qmoe":
        attributes |= {"expert_weight_bits": form.bits, "block_size": form.block}
        # The CUDA provider takes raw weights for its own layout unless told; others need not know the attribute.
        attributes |= {"weights_prepacked": 0} if form.cuda else {}
        attributes |= {"accuracy_level": 4} if form.bits == 4 and not form.cuda else {}
    name = "MoE" if form.experts == "moe" else "QMoE"
    y = emit.op(name, *inputs, name="experts", domain=DOMAIN, **attributes)
    if sums is None:
        return y if kind == op.x.type.dtype else emit.cast(y, op.x.type.dtype)
    y = emit.op("Mul", y if kind == "f32" else emit.cast(y, "f32"), sums, name="weighted")
    return low.rounded(y, op.x.type.dtype, "f32")


def _routing(op: ExpertFfn, low: Lowering, experts: int) -> tuple[Any, int, Any | None]:
    """The logits that the op is handed, how it normalises, and what its result is multiplied by: None or [T, 1]."""
    emit = low.emit
    route = low.routers.get(op.weights.name)
    if route is not None:
        return low.value(route.logits), int(route.normalize == "sum"), None
    weights = low.value(op.weights)
    weights = weights if op.weights.type.dtype == "f32" else emit.cast(weights, "f32")
    ids, weights = _inside(op, low, weights, experts)
    logits = _logits(low, ids, weights, experts, all_inside=op.experts.name in low.chosen)
    if op.weights.name in low.sums_to_one:
        return logits, 1, None
    return logits, 1, emit.op("ReduceSum", weights, emit.ints(1), keepdims=1, name="weight_of_token")


def _inside(op: ExpertFfn, low: Lowering, weights: Any, experts: int) -> tuple[Any, Any]:
    """experts[T, K] with E for "no expert", and weights[T, K], 0 there."""
    emit = low.emit
    ids = emit.cast(low.value(op.experts), "i64")
    if op.experts.name in low.chosen:
        return ids, weights
    inside = emit.op("And", emit.op("GreaterOrEqual", ids, emit.number(0)), emit.op("Less", ids, emit.number(experts)))
    ids = emit.op("Where", inside, ids, emit.number(experts), name="expert_of_slot")
    return ids, emit.op("Where", inside, weights, emit.scalar(0, "f32"))


def _logits(low: Lowering, ids: Any, weights: Any, experts: int, *, all_inside: bool) -> Any:
    """ids[T, K], weights[T, K] -> log W, f32[T, E]; slots without an expert go to a column that is cut off."""
    emit = low.emit
    none = emit.full(NOT_CHOSEN, "f32", emit.shape_of(weights, 0), experts + (not all_inside))
    chosen = emit.op("Max", weights, emit.scalar(LEAST_CHOSEN, "f32"))
    dense = emit.op("ScatterElements", none, ids, chosen, axis=1, reduction="add", name="weights_of_experts")
    if not all_inside:
        dense = emit.op("Slice", dense, emit.ints(0), emit.ints(experts), emit.ints(1))
    return emit.op("Log", dense, name="log_weights")


def _activation(op: ExpertFfn) -> dict[str, Any]:
    if op.layout == "none":
        return {"activation_type": op.fn}
    found: dict[str, Any] = {"activation_type": "swiglu", "swiglu_fusion": 1}
    alpha = 1.702 if op.fn == "quick_gelu" else float(op.alpha)
    found |= {"activation_alpha": alpha, "activation_beta": float(op.up_shift)}
    return found | ({} if op.limit is None else {"swiglu_limit": float(op.limit)})


def _tensors(op: ExpertFfn, low: Lowering, kind: str) -> list[Any]:
    """The op's weights, scales and biases in the order of its inputs."""
    experts = range(len(low.held[op.w_in.name]))
    first = [partial(_first, op, low, op.w_in, op.w_up, e) for e in experts]
    second = [partial(low.matrix, op.w_out, e) for e in experts]
    b_in = b_out = None
    if op.b_in is not None or op.b_up is not None:
        b_in = stacked(low.emit, "bias_in", [partial(_first, op, low, op.b_in, op.b_up, e) for e in experts], kind)
    if op.b_out is not None:
        b_out = stacked(low.emit, "bias_out", [partial(low.matrix, op.b_out, e) for e in experts], kind)
    if low.form.experts == "moe":
        return [stacked(low.emit, "in", first, kind), b_in, stacked(low.emit, "out", second, kind), b_out]
    bits, block = low.form.bits, low.form.block
    q_in, s_in = rounded_in_blocks(low.emit, "in", first, kind, bits=bits, block=block)
    q_out, s_out = rounded_in_blocks(low.emit, "out", second, kind, bits=bits, block=block)
    return [q_in, s_in, b_in, q_out, s_out, b_out]


def _first(op: ExpertFfn, low: Lowering, w: Value | None, up: Value | None, e: int) -> torch.Tensor:
    """The first matrix (or bias) of an expert, rows of gate and up by turns: [F or 2F, ...]."""
    if op.layout == "pair":
        one = w if w is not None else up
        assert one is not None
        parts = [low.matrix(v, e) if v is not None else torch.zeros_like(low.matrix(one, e)) for v in (w, up)]
    else:
        assert w is not None
        rows = low.matrix(w, e)
        if op.layout in ("none", "interleaved"):
            return rows
        if op.layout == "interleaved_up_first":
            return rows[torch.arange(len(rows)) ^ 1]
        parts = list(rows.chunk(2)) if op.layout == "concat" else list(rows.chunk(2))[::-1]
    return torch.stack(parts, 1).flatten(0, 1)
