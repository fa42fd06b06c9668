"""Experts computed in batched products: weights gathered by index, stacked, or all experts at once.

T tokens, K experts per token, E experts, N outputs, C inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from moec.frontends.torch.activation import constants, name_activation, nearest_name
from moec.frontends.torch.banks import Bank
from moec.frontends.torch.body import Body, view_tensor, written_body
from moec.frontends.torch.coordinates import MOVES, Line, line, moved_from, number, stack_of
from moec.frontends.torch.formula import write_activation
from moec.frontends.torch.hiddenscale import HiddenScale, check_scale
from moec.frontends.torch.instances import Instance, NotLifted, find_instances
from moec.frontends.torch.linears import Linear
from moec.frontends.torch.oplog import Entry, Log, Ref
from moec.frontends.torch.replay import replay
from moec.frontends.torch.routedslice import Reading
from moec.frontends.torch.tail import name_tail, with_tail
from moec.weights import View


@dataclass(frozen=True)
class Product:
    """One batched product: the banks it reads, and where features lie in its source and its result."""

    linear: Linear
    bank: tuple[View, ...]
    bias: tuple[View, ...] | None
    inputs: Line
    outputs: Line
    source_axis: int
    out_axis: int
    experts: frozenset[int]


def read_batched(log: Log, weights: set[str], params: Mapping[str, torch.Tensor]) -> Reading:
    """The body that the log's batched products compute. Raises NotLifted with the reason."""
    expert_params = {n: _one_axis(params[n]) for n in weights}
    found = [p for e in log.entries if (p := _product(log, e, expert_params)) is not None]
    if not found:
        raise NotLifted("no product with the candidate's weights was seen")
    return read_products(log, [_with_bias(log, p, params) for p in found], params)


def _one_axis(stack: torch.Tensor) -> torch.Tensor:
    """A stack of experts at several levels, [E1, E2, .., ..], as one of all of them."""
    return stack.flatten(0, -3) if stack.dim() > 3 and stack.is_contiguous() else stack


def read_products(log: Log, products: Sequence[Product], params: Mapping[str, torch.Tensor]) -> Reading:
    """The body of experts whose layers are one product each. Raises NotLifted with the reason."""
    by_entry = {p.linear.entry: p for p in products}
    instances = find_instances(log, [p.linear for p in products], params)
    if len(instances) != 1:
        raise NotLifted(f"{len(instances)} batched products where one expert body was expected")
    instance = instances[0]
    axis = by_entry[instance.last_product.entry].out_axis
    instance = with_tail(log, instance, dict(params), axis)
    parts = [by_entry[up.entry] for up in instance.ups]
    down = by_entry[instance.down.entry] if instance.down is not None else None
    banks = {}
    named = [(f"up{i}", part) for i, part in enumerate(parts)] + ([("down", down)] if down is not None else [])
    for role, part in named:
        banks[f"w_{role}"] = Bank(f"w_{role}", part.bank)
        if part.bias is not None:
            banks[f"b_{role}"] = Bank(f"b_{role}", part.bias)
    if instance.scale is not None:
        banks["w_scale"] = _scale_bank(log, instance.scale, params)
    if len({len(bank.views) for bank in banks.values() if not bank.shared}) > 1:
        raise NotLifted("weights are for different numbers of experts")
    body = Body(banks, None) if down is None else _with_activation(log, instance, parts, down, banks)
    if instance.tail:
        body = _with_tail(log, instance, body, params, axis)
    return Reading(body, instance.entries, (down or parts[0]).experts, instance.masks)


def _with_activation(
    log: Log, instance: Instance, parts: list[Product], down: Product, banks: Mapping[str, Bank]
) -> Body:
    def ask(hidden: list[torch.Tensor], vector: torch.Tensor | None = None) -> torch.Tensor:
        return _ask(log, instance, parts, down, hidden, vector)

    widths, width = [part.bank[0].shape[0] for part in parts], down.bank[0].shape[1]
    tolerance = 1e-5 if log.tensors[down.linear.source].dtype in (torch.float32, torch.float64) else 2e-2
    if instance.scale is not None:
        check_scale(ask, widths, width, tolerance)
    activation = name_activation(ask, widths, width, constants(log, instance.middle), tolerance)
    if activation is not None:
        return Body(banks, activation)
    written = write_activation(log, instance, width, ask, tolerance, parts[0].out_axis)
    if written is None:
        ops = [log.entries[i].name for i in instance.middle if log.entries[i].name not in MOVES]
        close = nearest_name(ask, widths, width, constants(log, instance.middle))
        said = ", ".join(ops[:8]) or "none"
        raise NotLifted(f"the operations between the experts' layers have no name here: {said}", close)
    return written_body(banks, written)


def _with_tail(log: Log, instance: Instance, body: Body, params: Mapping[str, torch.Tensor], axis: int) -> Body:
    """The body with a norm that all experts share; what is gathered for each row is not followed."""
    if any(params[view.param].numel() != view.shape[0] for view in instance.vectors):
        raise NotLifted("the norm behind the experts' layers is not one vector for all of them")
    norm, places = name_tail(log, instance, [view_tensor(params, view) for view in instance.vectors], axis)
    vectors = {
        role: Bank(role, (instance.vectors[place],))
        for role, place in zip(("w_tail", "b_tail"), places, strict=True)
        if place is not None
    }
    return replace(body, banks={**body.banks, **vectors}, tail=norm)


_PRODUCTS = frozenset({"bmm", "mm", "baddbmm", "addmm"})
# Rows sorted by expert times a stack of matrices; transformers has a custom op of its own beside ATen's.
_GROUPED = frozenset({"_grouped_mm", "grouped_mm_fallback"})


def _product(log: Log, entry: Entry, weights: Mapping[str, torch.Tensor]) -> Product | None:
    grouped = entry.name in _GROUPED
    if not grouped and (entry.name not in _PRODUCTS or entry.kwargs or not all(isinstance(a, Ref) for a in entry.args)):
        return None
    left, right = (a.slot for a in (entry.args[:2] if grouped else entry.args[-2:]))
    for operand, source, contraction, free, source_axis, out_axis in (
        (right, left, -2, -1, -1, -1),
        (left, right, -1, -2, -2, -2),
    ):
        moves = moved_from(log, operand, entry.index, weights)
        if moves is None:
            continue
        if not grouped and len(entry.args) == 3:
            raise NotLifted(f"{entry.name} adds to a batched product of experts")
        bank, inputs, outputs, experts = _read_operand(log, operand, moves, weights, contraction, free)
        linear = Linear(entry.index, source, bank[0], None, entry.results[0], entry.index)
        return Product(linear, bank, None, inputs, outputs, source_axis, out_axis, experts)
    return None


def _read_operand(
    log: Log, operand: int, moves: set[int], weights: Mapping[str, torch.Tensor], contraction: int, free: int
) -> tuple[tuple[View, ...], Line, Line, frozenset[int]]:
    """The bank an operand was moved from, and where its inputs and outputs lie."""
    tensor, name = log.tensors[operand], log.param_of(operand)
    if name is not None and tensor.dim() == 3 and tensor.shape[0] == weights[name].shape[0]:
        # A view of the whole stack: its strides say it all, however large it is.
        base = int(tensor.storage_offset() - weights[name].storage_offset())
        inputs, outputs = (Line.even(0, tensor.stride(axis), tensor.shape[axis]) for axis in (contraction, free))
        shape, stride = (outputs.length, inputs.length), (outputs.step, inputs.step)
        bank = tuple(View(name, base + e * tensor.stride(0), shape, stride) for e in range(tensor.shape[0]))
        return bank, inputs, outputs, frozenset(range(tensor.shape[0]))
    numbers = number(log, operand, moves, weights)
    stack, count = stack_of(numbers, weights)
    expert, element = stack.split(numbers)
    inputs, outputs = line(expert, element, contraction), line(expert, element, free)
    base = int(element[expert == expert.flatten()[0]].min())
    bank = stack.views(count, base, (outputs.length, inputs.length), (outputs.step, inputs.step))
    return bank, inputs, outputs, frozenset(torch.unique(expert).tolist())


def _with_bias(log: Log, product: Product, params: Mapping[str, torch.Tensor]) -> Product:
    """Take a per-expert bias that is added once the result was only moved."""
    users = log.users_behind(product.linear.out, product.linear.last, MOVES)
    if not users or (len(users) > 1 and users[0].name != "add_"):
        return product
    user, width = users[0], product.bank[0].shape[0]
    if (
        user.name not in ("add", "add_")
        or user.kwargs
        or len(user.args) != 2
        or not all(isinstance(a, Ref) for a in user.args)
    ):
        return product
    vectors = {n: p for n, p in params.items() if p.dim() in (1, 2, 3)}
    for argument in user.args:
        moves = moved_from(log, argument.slot, user.index, vectors)
        if moves is not None and log.tensors[user.results[0]].shape[-1] == width:
            break
    else:
        return product
    numbers = number(log, argument.slot, moves, vectors)
    stack, count = stack_of(numbers, vectors)
    spaced = line(*stack.split(numbers), -1)
    if count != len(product.bank) or spaced.length != width:
        return product
    bias = stack.views(count, spaced.base, (width,), (spaced.step,))
    linear = replace(product.linear, bias=bias[0], out=user.results[0], last=user.index)
    return replace(product, linear=linear, bias=bias, outputs=Line.even(0, 1, width), out_axis=-1)


def _scale_bank(log: Log, scale: HiddenScale, params: Mapping[str, torch.Tensor]) -> Bank:
    """The vectors that multiply hidden values, one for each expert or one for all."""
    if scale.view is not None and params[scale.view.param].dim() == 1:
        return Bank("w_scale", (scale.view,))
    moves = moved_from(log, scale.slot, scale.entry, params)
    assert moves is not None
    numbers = number(log, scale.slot, moves, params)
    stack, count = stack_of(numbers, params)
    spaced = line(*stack.split(numbers), -1)
    return Bank("w_scale", stack.views(count, spaced.base, (spaced.length,), (spaced.step,)))


def _ask(
    log: Log,
    instance: Instance,
    parts: list[Product],
    down: Product,
    hidden: list[torch.Tensor],
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the recorded entries make of one hidden vector, which stands in every row.

    `scale` stands for the one of parameters that multiplies them, ones where it is None.
    """
    given = {mask.operand: mask.keeping(log) for mask in instance.masks}
    if instance.scale is not None:
        given[instance.scale.slot] = instance.scale.values(log, scale)
    for part, vector in zip(parts, hidden, strict=True):
        like = log.tensors[part.linear.out]
        shape = [1] * like.dim()
        shape[part.out_axis] = -1
        values = vector[part.outputs.feature].to(like.device).reshape(shape)
        given[part.linear.out] = values.expand(like.shape).clone()
    try:
        answer = replay(log, instance.middle, given, down.linear.source)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise NotLifted(f"the operations between the experts' layers cannot be run again: {error}") from error
    first = answer.movedim(down.source_axis, -1).reshape(-1, answer.shape[down.source_axis])
    if not torch.allclose(first, first[:1].expand(first.shape), rtol=1e-5, atol=1e-6, equal_nan=True):
        raise NotLifted("equal rows of an expert get different results")
    own = down.inputs.expert == down.inputs.expert[0]
    out = torch.empty(down.inputs.length, device=first.device)
    out[down.inputs.feature[own]] = first[0][own].float()
    return out
