"""From chosen experts to rows sorted by expert, as ONNX nodes.

T tokens, K experts per token, E experts, D model width, R rows. TopK with the smallest first is a stable sort: among
equals it keeps the lower index first.
"""

from __future__ import annotations

from typing import Any

from moec.backends.onnx.emitter import Emitter
from moec.backends.onnx.lowering import Groups, Lowering
from moec.ir import Exchange, Gather, Group, Value


def sort(emit: Emitter, keys: Any, count: Any, *, descending: bool = False) -> Any:
    """keys[R] -> int64[R]: the stable order of the keys. `count` is R, an int64[1]."""
    _, order = emit.op_many("TopK", 2, keys, count, axis=0, largest=int(descending), sorted=1, name="sort")
    return order


def expert_keys(low: Lowering, ids: Value, experts: int) -> tuple[Any, Any | None]:
    """ids[T, K] -> the expert of each slot, int64[R], with E for "no expert"; and which are inside, None for all."""
    emit = low.emit
    flat = emit.reshape(emit.cast(low.value(ids), "i64"), -1)
    if ids.name in low.chosen:
        return flat, None
    inside = emit.op(
        "And", emit.op("GreaterOrEqual", flat, emit.number(0)), emit.op("Less", flat, emit.number(experts))
    )
    return emit.op("Where", inside, flat, emit.number(experts), name="expert_of_slot"), inside


def count_rows(low: Lowering, keys: Any, experts: int, *, all_inside: bool) -> Groups:
    """keys int64[R] in 0..E -> how many rows each expert has."""
    emit = low.emit
    ones = emit.op("Expand", emit.number(1), emit.op("Shape", keys), name="ones")
    zeros = emit.ints(*([0] * (experts + 1)))
    counts = emit.op("ScatterElements", zeros, keys, ones, axis=0, reduction="add", name="rows_of_experts")
    if all_inside:
        return Groups(counts, None)
    return Groups(counts, emit.op("Gather", counts, emit.number(experts), axis=0, name="left_out"))


def group(op: Group, low: Lowering) -> list[Any]:
    if op.by == "expert":
        return _group_chosen(op, low)
    emit = low.emit
    keys, inside = expert_keys(low, op.ids, op.experts)
    if op.capacity is not None:
        kept = _within_capacity(op, low, keys)
        inside = kept if inside is None else emit.op("And", inside, kept)
        keys = emit.op("Where", inside, keys, emit.number(op.experts))
    groups = count_rows(low, keys, op.experts, all_inside=inside is None)
    rows = emit.op("Shape", keys)
    order = sort(emit, keys, rows)
    if groups.left_out is not None:
        total = emit.op("Squeeze", rows, emit.ints(0))
        place = emit.range(total)
        held = emit.op("Less", place, emit.op("Sub", total, groups.left_out))
        order = emit.op("Where", held, order, emit.number(-1))
    offsets = offsets_of(low, groups.counts)
    low.groups[offsets.name] = groups
    return [emit.cast(order, "i32"), offsets]


def offsets_of(low: Lowering, counts: Any) -> Any:
    """counts int64[E+1] -> offsets i32[E+1]: the sum of those before."""
    emit = low.emit
    return emit.cast(emit.op("CumSum", counts, emit.number(0), exclusive=1), "i32")


def _group_chosen(op: Group, low: Lowering) -> list[Any]:
    """tokens[E, C] of expert choice: as they are."""
    emit = low.emit
    ids = low.value(op.ids)
    places = emit.op("Mul", emit.range(emit.number(op.experts + 1)), emit.shape_of(ids, 1))
    return [emit.cast(emit.reshape(ids, -1), "i32"), emit.cast(places, "i32")]


def _within_capacity(op: Group, low: Lowering, keys: Any) -> Any:
    """keys int64[R] -> bool[R]: the slots among the first `capacity` of their expert and scope."""
    emit = low.emit
    assert op.capacity is not None
    rows = emit.op("Shape", keys)
    total = emit.op("Squeeze", rows, emit.ints(0))
    slots = emit.range(total)
    k = emit.shape_of(low.value(op.ids), 1)
    order = slots
    # Stable sorts, the least important key first, leave equal slots in ascending order.
    if op.weights is not None:
        order = _by_weight(op, low, rows, order)
    if op.priority == "choice":
        order = _sorted_by(emit, emit.op("Mod", slots, k), order, rows)
    order = _sorted_by(emit, keys, order, rows)
    parts = keys
    scopes: Any = emit.number(1)
    if op.sequence is not None:
        length = emit.op("Mul", emit.size_value(op.sequence), k)
        scope = emit.op("Div", slots, length)
        order = _sorted_by(emit, scope, order, rows)
        parts = emit.op("Add", emit.op("Mul", scope, emit.number(op.experts + 1)), keys)
        scopes = emit.op("Add", emit.op("Div", total, length), emit.number(1))
    part = emit.op("Gather", parts, order, axis=0)
    many = emit.op("Mul", scopes, emit.number(op.experts + 1))
    far = emit.op("Expand", total, emit.vector(many))
    first = emit.op("ScatterElements", far, part, slots, axis=0, reduction="min", name="first_of_part")
    rank = emit.op("Sub", slots, emit.op("Gather", first, part, axis=0))
    rank = emit.op("ScatterElements", slots, order, rank, axis=0, name="rank_of_slot")
    return emit.op("Less", rank, emit.size_value(op.capacity))


def _sorted_by(emit: Emitter, keys: Any, order: Any, rows: Any, *, descending: bool = False) -> Any:
    """An order of slots, sorted stably by the slots' keys."""
    found = sort(emit, emit.op("Gather", keys, order, axis=0), rows, descending=descending)
    return emit.op("Gather", order, found, axis=0)


def _by_weight(op: Group, low: Lowering, rows: Any, order: Any) -> Any:
    """The larger worth first, and what is not a number last."""
    emit = low.emit
    assert op.weights is not None
    weights = low.wide(op.weights)
    if op.policy == "token_weight":
        nan = emit.op("ReduceMax", emit.cast(emit.op("IsNaN", weights), "i32"), emit.ints(1), keepdims=1)
        best = emit.op("ReduceMax", weights, emit.ints(1), keepdims=1)
        weights, nan = (emit.op("Expand", one, emit.op("Shape", low.value(op.weights))) for one in (best, nan))
        lost = emit.reshape(nan, -1)
    else:
        lost = emit.reshape(emit.cast(emit.op("IsNaN", weights), "i32"), -1)
    worth = emit.reshape(weights, -1)
    dtype = "f64" if op.weights.type.dtype == "f64" else "f32"
    worth = emit.op("Where", emit.cast(lost, "bool"), emit.scalar(0, dtype), worth)
    order = _sorted_by(emit, worth, order, rows, descending=True)
    return _sorted_by(emit, lost, order, rows)


def gather(op: Gather, low: Lowering) -> list[Any]:
    emit = low.emit
    order = emit.cast(low.value(op.order), "i64")
    token = order if op.k == 1 else emit.op("Div", emit.op("Max", order, emit.number(0)), emit.number(op.k))
    token = emit.op("Max", token, emit.number(0))
    rows = emit.op("Gather", low.value(op.x), token, axis=0, name="rows")
    missing = emit.op("Unsqueeze", emit.op("Less", order, emit.number(0)), emit.ints(1))
    return [emit.zero_where(missing, rows, op.x.type.dtype)]


def groups_of(low: Lowering, rows: Any, offsets: Value, experts: int) -> Groups:
    """The groups that offsets i32[E+1] mean for rows[R, C]."""
    found = low.value(offsets)
    if found.name not in low.groups:
        emit = low.emit
        wide = emit.cast(found, "i64")
        after = emit.op("Slice", wide, emit.ints(1), emit.ints(experts + 1), emit.ints(0))
        before = emit.op("Slice", wide, emit.ints(0), emit.ints(experts), emit.ints(0))
        last = emit.op("Gather", wide, emit.number(experts), axis=0)
        rest = emit.op("Sub", emit.shape_of(rows, 0), last)
        counts = emit.op("Concat", emit.op("Sub", after, before), emit.vector(rest), axis=0)
        low.groups[found.name] = Groups(counts, rest)
    return low.groups[found.name]


def exchange(op: Exchange, low: Lowering) -> list[Any]:
    emit, experts = low.emit, len(op.owners)
    groups = groups_of(low, low.value(op.rows), op.offsets, experts)
    parts = list(emit.op_many("Split", experts + 1, low.value(op.rows), groups.counts, axis=0))
    device_order = list(op.device_order())
    sources = sorted(range(experts), key=device_order.__getitem__) if op.back else device_order
    width = emit.shape_of(low.value(op.rows), 1)
    tail = emit.full(0, op.rows.type.dtype, emit.shape_of(parts[-1], 0), width)
    counts = emit.op("Gather", groups.counts, emit.ints(*sources, experts), axis=0)
    offsets = emit.cast(offsets_of(low, counts), op.offsets.type.dtype)
    low.groups[offsets.name] = Groups(counts, groups.left_out)
    return [emit.op("Concat", *(parts[e] for e in sources), tail, axis=0), offsets]
