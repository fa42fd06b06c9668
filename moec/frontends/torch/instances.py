"""Instances: one expert's computation found in a log, as two layers of products with entries between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moec.frontends.torch.linears import Linear
from moec.frontends.torch.oplog import Log, Ref
from moec.weights import View

class NotLifted(Exception):
    """A candidate cannot be lifted; the text says why, for the report."""


@dataclass(frozen=True)
class Instance:
    """One expert's computation: `ups` read rows, `down` reads the hidden values, `middle` are the entries between them."""

    ups: tuple[Linear, ...]
    down: Linear | None
    middle: tuple[int, ...]

    @property
    def rows(self) -> int:
        return self.ups[0].source

    @property
    def out(self) -> int:
        return (self.down or self.ups[-1]).out

    @property
    def entries(self) -> tuple[int, ...]:
        """Indices of all its entries."""
        ends = (*self.ups, *([self.down] if self.down is not None else []))
        return (*(i for linear in ends for i in (linear.entry, linear.last)), *self.middle)


def find_instances(log: Log, linears: Sequence[Linear]) -> list[Instance]:
    """Chains rows -> ups -> middle -> down among the products.

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
            raise NotLifted("experts chain more than two matrices")
        if used & set(sources):
            raise NotLifted("two products read the same expert's hidden values")
        used |= set(sources) | {i}
        instances.append(Instance(tuple(linears[j] for j in sources), linears[i], middle_entries))
    if not instances:
        return [Instance((linear,), None, ()) for linear in linears]
    loose = [linear.weight.param for i, linear in enumerate(linears) if i not in used]
    if loose:
        raise NotLifted(f"weight {loose[0]!r} is used outside the experts' two layers")
    for instance in instances:
        check_instance(log, instance)
    return instances


def check_instance(log: Log, instance: Instance) -> None:
    """Refuse an instance that mixes its hidden values with anything but numbers."""
    rows = log.value(instance.rows, instance.ups[0].entry)
    for up in instance.ups[1:]:
        other = log.value(up.source, up.entry)
        if up.source != instance.rows and (rows is None or other is None or rows.shape != other.shape or not torch.equal(rows, other)):
            raise NotLifted("an expert's first layers read different rows")
    if len(instance.ups) > 2:
        raise NotLifted(f"an expert has {len(instance.ups)} first layers")
    stop = {up.out for up in instance.ups}
    made = {slot for i in instance.middle for slot in log.entries[i].results}
    for index in instance.middle:
        for slot in log.entries[index].reads:
            if slot not in stop and slot not in made and log.tensors[slot].numel() > 1:
                name = log.param_of(slot)
                what = f"parameter {name!r}" if name else f"a tensor of shape {tuple(log.tensors[slot].shape)}"
                raise NotLifted(f"hidden values are mixed with {what} by {log.entries[index].name}")


def signature(log: Log, instance: Instance) -> tuple[Any, ...]:
    """What the instance computes, apart from its rows' number and the weights it reads."""
    rows = log.tensors[instance.rows]
    count = rows.numel() // rows.shape[-1] if rows.dim() else 1
    local: dict[int, int] = {up.out: i for i, up in enumerate(instance.ups)}

    def leaf(value: Any) -> Any:
        if isinstance(value, Ref):
            return ("slot", local.setdefault(value.slot, len(local)))
        if isinstance(value, (list, tuple)):
            return tuple(leaf(v) for v in value)
        return ("rows",) if type(value) is int and value == count else (type(value).__name__, str(value))

    steps = []
    for index in instance.middle:
        entry = log.entries[index]
        steps.append((entry.name, leaf(entry.args), tuple((k, leaf(v)) for k, v in sorted(entry.kwargs.items())), leaf(entry.outs)))
    shapes = tuple((linear.weight.shape, linear.bias is not None) for linear in (*instance.ups, *([instance.down] if instance.down else [])))
    return (tuple(steps), shapes)


def roles(instance: Instance) -> dict[str, View]:
    """The instance's weights by role: w_up0 (and w_up1), w_down, and their biases."""
    named: dict[str, View] = {}
    for i, up in enumerate(instance.ups):
        named[f"w_up{i}"] = up.weight
        if up.bias is not None:
            named[f"b_up{i}"] = up.bias
    if instance.down is not None:
        named["w_down"] = instance.down.weight
        if instance.down.bias is not None:
            named["b_down"] = instance.down.bias
    return named
