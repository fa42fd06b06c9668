"""Instances: one expert's computation found in a log, as two layers of products with entries between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from moec.frontends.torch.hiddenscale import HiddenScale, read_scale
from moec.frontends.torch.linears import Linear
from moec.frontends.torch.oplog import Log, Ref
from moec.frontends.torch.reasons import Chained, NotLifted, Unsuited
from moec.frontends.torch.rowmasks import RowMask, read_masks, unexplained, unproved
from moec.weights import View

__all__ = ["Chained", "Instance", "NotLifted", "Signature", "Unsuited"]


@dataclass(frozen=True)
class Instance:
    """One expert's computation: `ups` read rows, `down` the hidden values, `middle` are the entries between.

    `tail` are the entries of a norm behind the last product, `end` its result, `vectors` the parameters it reads.
    `masks` are those of `middle` that clear rows by ids of experts, which is still to be proved of them. `scale` is a
    vector of parameters that multiplies in `middle`; that it scales the hidden values is still to be proved, too.
    """

    ups: tuple[Linear, ...]
    down: Linear | None
    middle: tuple[int, ...]
    tail: tuple[int, ...] = ()
    end: int | None = None
    vectors: tuple[View, ...] = ()
    masks: tuple[RowMask, ...] = ()
    scale: HiddenScale | None = None

    @property
    def last_product(self) -> Linear:
        return self.down or self.ups[-1]

    @property
    def rows(self) -> int:
        return self.ups[0].source

    @property
    def out(self) -> int:
        return self.last_product.out if self.end is None else self.end

    @property
    def entries(self) -> tuple[int, ...]:
        """Indices of all its entries."""
        ends = (*self.ups, *([self.down] if self.down is not None else []))
        return (*(i for linear in ends for i in (linear.entry, linear.last)), *self.middle, *self.tail)


def find_instances(
    log: Log, linears: Sequence[Linear], params: Mapping[str, torch.Tensor] | None = None
) -> list[Instance]:
    """Chains rows -> ups -> middle -> down among the products; vectors that scale hidden values lie in `params`.

    A product whose source is computed from other products' results alone is a down-projection of those. Raises
    NotLifted when the products do not pair up, or hidden values are mixed with something else.
    """
    stop = {linear.out: linear.last for linear in linears}
    position = {linear.out: i for i, linear in enumerate(linears)}
    behind: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for linear in linears:
        middle = log.closure([(linear.source, linear.entry)], stop=stop)
        touched = {slot for i in middle for slot in log.entries[i].reads} | {linear.source}
        behind.append((tuple(sorted(position[s] for s in touched if s in position)), tuple(sorted(middle))))
    used: set[int] = set()
    instances = []
    for i, (sources, middle_entries) in enumerate(behind):
        if not sources:
            continue
        if any(behind[j][0] for j in sources):
            raise Chained("experts chain more than two matrices")
        if used & set(sources):
            raise NotLifted("two products read the same expert's hidden values")
        used |= set(sources) | {i}
        found = _between(log, [linears[j] for j in sources], linears[i], middle_entries, stop)
        instances.append(with_scale(log, found, stop, params or {}))
    if not instances:
        return [Instance((linear,), None, ()) for linear in linears]
    loose = [linear.weight.param for i, linear in enumerate(linears) if i not in used]
    if loose:
        raise NotLifted(f"weight {loose[0]!r} is used outside the experts' two layers")
    for instance in instances:
        check_instance(log, instance)
    return instances


def _between(
    log: Log, ups: Sequence[Linear], down: Linear, middle: tuple[int, ...], stop: Mapping[int, int]
) -> Instance:
    """The instance of these layers; what masks over its rows are made of is no part of its middle."""
    masks = read_masks(log, middle, [up.out for up in ups])
    if isinstance(masks, str):
        raise NotLifted(masks)
    if masks:
        given = {mask.operand: mask.entry for mask in masks}
        middle = tuple(sorted(log.closure([(down.source, down.entry)], stop={**given, **stop})))
    return Instance(tuple(ups), down, middle, masks=masks)


def with_scale(log: Log, instance: Instance, stop: Mapping[int, int], params: Mapping[str, torch.Tensor]) -> Instance:
    """The instance with the vector that multiplies its hidden values, where there is one."""
    down = instance.down
    assert down is not None
    scale = read_scale(log, instance.middle, [up.out for up in instance.ups], down.weight.shape[1], params)
    if scale is None:
        return instance
    given = {scale.slot: scale.entry, **{mask.operand: mask.entry for mask in instance.masks}}
    middle = log.closure([(down.source, down.entry)], stop={**given, **stop})
    return replace(instance, middle=tuple(sorted(middle)), scale=scale)


def check_instance(log: Log, instance: Instance) -> None:
    """Refuse an instance that mixes its hidden values with anything but numbers."""
    rows = log.value(instance.rows, instance.ups[0].entry)
    for up in instance.ups[1:]:
        other = log.value(up.source, up.entry)
        if up.source != instance.rows and (
            rows is None or other is None or rows.shape != other.shape or not torch.equal(rows, other)
        ):
            raise NotLifted("an expert's first layers read different rows")
    if len(instance.ups) > 2:
        raise NotLifted(f"an expert has {len(instance.ups)} first layers")
    stop = {up.out for up in instance.ups}
    made = {slot for i in instance.middle for slot in log.entries[i].results}
    allowed = {(mask.entry, mask.operand) for mask in instance.masks}
    allowed |= {(scale.entry, scale.slot) for scale in (instance.scale,) if scale is not None}
    for index in instance.middle:
        for slot in log.entries[index].reads:
            if slot in stop or slot in made or (index, slot) in allowed:
                continue
            if log.param_of(slot) is not None or log.tensors[slot].numel() > 1:
                name = log.param_of(slot)
                kind = "torch.tensor(...)" if log.is_literal(slot) else "tensor"
                what = f"parameter {name!r}" if name else f"a {kind} of shape {tuple(log.tensors[slot].shape)}"
                raise NotLifted(f"hidden values are mixed with {what} by {log.entries[index].name}")


def check_masks(
    log: Log,
    masks: Sequence[RowMask],
    is_ids: Callable[[int], bool],
    experts: int,
    around: Iterable[RowMask] = (),
) -> None:
    """Refuse a mask over hidden rows that is not proved to keep those of every id from 0 to experts - 1.

    Of masks `around` the layers, those are refused that depend on more than ids.
    """
    reasons = [unproved(log, mask, is_ids, experts) for mask in masks]
    reasons += [unexplained(log, mask, is_ids) for mask in around]
    reason = next((reason for reason in reasons if reason is not None), None)
    if reason is not None:
        raise NotLifted(reason)


@dataclass(frozen=True)
class Signature:
    """What an instance computes, apart from the weights it reads.

    An argument equal to its number of rows may stand for that number.
    """

    rows: int
    leaves: tuple[Any, ...]

    def same(self, other: Signature) -> bool:
        """Equal, where both being the number of rows is equal too."""
        if len(self.leaves) != len(other.leaves):
            return False
        return all(
            a == b or (type(a) is int and type(b) is int and (a, b) == (self.rows, other.rows))
            for a, b in zip(self.leaves, other.leaves, strict=True)
        )


def signature(log: Log, instance: Instance) -> Signature:
    """The instance's operations, their arguments and the shapes of its weights, flattened."""
    rows = log.tensors[instance.rows]
    local: dict[int, int] = {up.out: i for i, up in enumerate(instance.ups)}
    leaves: list[Any] = []

    def add(value: Any) -> None:
        if isinstance(value, Ref):
            leaves.append(f"slot {local.setdefault(value.slot, len(local))}")
        elif isinstance(value, (list, tuple)):
            leaves.append(f"{len(value)} of")
            for item in value:
                add(item)
        else:
            leaves.append(value if type(value) is int else repr(value))

    for index in (*instance.middle, *instance.tail):
        entry = log.entries[index]
        if entry.results and all(log.param_of(slot) is not None for slot in entry.results):
            continue  # an expert's own place in a parameter
        leaves.append(entry.name)
        add(entry.args)
        add(sorted(entry.kwargs.items()))
        add(entry.outs)
    for linear in (*instance.ups, *([instance.down] if instance.down is not None else [])):
        leaves += [str(linear.weight.shape), linear.bias is not None]
    return Signature(rows.numel() // rows.shape[-1] if rows.dim() and rows.shape[-1] else 1, tuple(leaves))


def roles(instance: Instance) -> dict[str, View]:
    """The instance's weights by role: w_up0 (and w_up1), w_down, their biases, and what the tail reads."""
    named: dict[str, View] = {}
    for i, up in enumerate(instance.ups):
        named[f"w_up{i}"] = up.weight
        if up.bias is not None:
            named[f"b_up{i}"] = up.bias
    if instance.down is not None:
        named["w_down"] = instance.down.weight
        if instance.down.bias is not None:
            named["b_down"] = instance.down.bias
    if instance.scale is not None:
        named["w_scale"] = instance.scale.vector
    named.update({f"{i}_tail": vector for i, vector in enumerate(instance.vectors)})
    return named
