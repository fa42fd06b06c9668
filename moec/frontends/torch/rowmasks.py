"""Masks over experts' rows: code that clears the rows of ids that stand for no expert.

Where every id stands for an expert such a mask does nothing, so no probe shows what it does. It is read off the log and
proved: what it is made of must be each row's own id, seen through comparisons with numbers, and it must keep the rows
of each of the experts. Anything else that could clear a row (its place, a count, a value) is refused.

R rows, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

import torch

from moec.frontends.torch.oplog import Entry, Log, Ref
from moec.frontends.torch.replay import replay

# What arranges the elements of its first argument in any order, and what makes each element of one element.
_MOVES = frozenset(
    [
        *("t", "transpose", "permute", "view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "expand"),
        *("unsqueeze", "squeeze", "select", "slice", "split", "split_with_sizes", "chunk", "unbind", "narrow"),
        *("index", "index_select", "gather", "take_along_dim", "repeat", "sort"),
    ]
)
_ELEMENTWISE = frozenset(
    [
        *("ge", "gt", "le", "lt", "eq", "ne", "logical_not", "bitwise_not", "neg", "add", "sub", "rsub", "mul"),
        *("clamp", "clamp_min", "clamp_max", "_to_copy", "clone", "contiguous", "alias", "detach"),
    ]
)
_JOINS = frozenset({"logical_and", "logical_or", "bitwise_and", "bitwise_or", "__and__", "__or__"})
# Tensors of one number each, whatever tensor they are made like.
_FILLED = frozenset({"zeros", "zeros_like", "new_zeros", "full", "full_like", "new_full", "scalar_tensor"})
IsIds = Callable[[int], bool]


@dataclass(frozen=True)
class RowMask:
    """An entry that leaves the rows of `data` where `operand` is `kept` and clears the others."""

    entry: int
    data: int
    operand: int
    kept: float

    def keeping(self, log: Log) -> torch.Tensor:
        """The operand's values that leave all rows as they are."""
        return torch.full_like(log.tensors[self.operand], self.kept)


@dataclass
class _Path:
    """How a mask is made of ids: the entries, where they start, and the operands of entries that join two masks."""

    steps: set[int] = field(default_factory=set)
    ids: set[int] = field(default_factory=set)
    joined: set[int] = field(default_factory=set)


def read_masks(log: Log, middle: Collection[int], outs: Collection[int]) -> tuple[RowMask, ...] | str:
    """The masks among the entries between an expert's products `outs` and its next one, or why one is none.

    What is no mask over rows, or depends on hidden values, is left to others.
    """
    hidden, found = set(outs), []
    for index in sorted(middle):
        entry = log.entries[index]
        if hidden.isdisjoint(entry.reads) or entry.name in _FILLED:
            continue
        mask = _mask(log, entry, hidden)
        hidden.update((*entry.results, *entry.writes))
        if isinstance(mask, str):
            return mask
        if mask is not None:
            found.append(mask)
    return tuple(found)


def _mask(log: Log, entry: Entry, hidden: Collection[int]) -> RowMask | str | None:
    args = [a.slot if isinstance(a, Ref) else None for a in entry.args]
    read = [(slot, slot in hidden) for slot in args if slot is not None]
    match entry.name, args:
        case (("masked_fill" | "masked_fill_"), [int(data), int(operand), _]):
            kept, other = 0.0, entry.args[2]
        case "where", [int(operand), int(first), int(second)]:
            data, fill, kept = (first, second, 1.0) if first in hidden else (second, first, 0.0)
            other = Ref(fill)
        case (("mul" | "mul_"), [int(first), int(second)]):
            data, operand = (first, second) if first in hidden else (second, first)
            kept, other = 1.0, 0
        case _:
            return None
    if data not in hidden or operand in hidden or [s for s, inside in read if inside] != [data]:
        return None
    path, mask = _walk(log, operand, entry.index), RowMask(entry.index, data, operand, kept)
    if isinstance(path, str):
        asked = entry.name.startswith(("masked_fill", "where")) and _over_rows(log.tensors[operand])
        return f"experts' rows are masked by more than their expert ids: {path}" if asked else None
    number = _number(log, other, entry.index)
    if number is None:
        return None
    return mask if number == 0 else f"masked rows of an expert's hidden values are set to {number:g}"


def idle_masks(log: Log, entries: Collection[int]) -> Iterator[RowMask]:
    """Masks among the entries that left everything as it was in this run: what else they do it does not show."""
    for index in sorted(entries):
        entry = log.entries[index]
        args = [a.slot for a in entry.args if isinstance(a, Ref)]
        if not args or not all(log.tensors[slot].is_floating_point() for slot in entry.results):
            continue
        match entry.name:
            case "masked_fill" | "masked_fill_":
                data, operand, kept = args[0], args[1], 0.0
            case "where" if len(args) == 3:
                operand, data = args[:2]
                kept = float(_is_whole(log, operand, index, 1.0))
            case "mul" | "mul_" if len(args) == 2 and any(_is_choice(log, slot) for slot in args):
                operand, kept = next(slot for slot in args if _is_choice(log, slot)), 1.0
                data = args[1] if operand == args[0] else args[0]
            case _:
                continue
        if log.tensors[operand].numel() > 1 and _is_whole(log, operand, index, kept):
            yield RowMask(index, data, operand, kept)


def _is_whole(log: Log, slot: int, at: int, value: float) -> bool:
    held = log.value(slot, at)
    return held is not None and bool((held == value).all())


def _is_choice(log: Log, slot: int) -> bool:
    """Whether the tensor is true or false, or a cast of what is, in whatever arrangement."""
    while log.tensors[slot].dtype != torch.bool:
        made = log.producer(slot)
        entry = log.entries[made] if made is not None else None
        moved = entry is not None and (entry.name in _MOVES or entry.name == "_to_copy")
        if entry is None or not moved or not entry.args or not isinstance(entry.args[0], Ref):
            return False
        slot = entry.args[0].slot
    return True


def _over_rows(operand: torch.Tensor) -> bool:
    """Whether one value holds for all features of a row."""
    return operand.numel() > 1 and (operand.shape[-1] == 1 or operand.stride(-1) == 0)


def _number(log: Log, fill: object, at: int) -> float | None:
    """What masked rows are filled with, where it is one number."""
    if not isinstance(fill, Ref):
        return float(fill) if isinstance(fill, (int, float)) else None
    made, value = log.producer(fill.slot), log.value(fill.slot, at)
    if value is None or not value.numel() or log.param_of(fill.slot) is not None or log.writers(fill.slot, at):
        return None
    fixed = value.numel() == 1 if made is None else log.entries[made].name in _FILLED
    return float(value.flatten()[0]) if fixed else None


def _walk(log: Log, operand: int, at: int, is_ids: IsIds | None = None) -> _Path | str:
    """How the operand is made of integers (those that `is_ids` accepts, where it is given), or what else it reads."""
    path, todo = _Path(), [(operand, at)]
    while todo:
        slot, moment = todo.pop()
        if is_ids is not None and is_ids(slot):
            path.ids.add(slot)
            continue
        entry = _step(log, slot, moment)
        if isinstance(entry, Entry):
            path.steps.add(entry.index)
            reads = [a.slot for a in entry.args[: 2 if entry.name in _JOINS else 1] if isinstance(a, Ref)]
            path.joined.update(reads if len(reads) > 1 else ())
            todo += [(read, entry.index) for read in reads]
            continue
        kind = log.tensors[slot].dtype
        if is_ids is not None or slot == operand or kind.is_floating_point or kind == torch.bool:
            return entry
        path.ids.add(slot)
    return path


def _step(log: Log, slot: int, at: int) -> Entry | str:
    """The entry that makes the tensor's elements of one element each of another, or what makes it instead."""
    shape, name, made = tuple(log.tensors[slot].shape), log.param_of(slot), log.producer(slot)
    if name is not None:
        return f"{name!r}"
    if made is None or made >= at:
        return f"a tensor of shape {shape}"
    entry = log.entries[made]
    values = entry.name != "sort" or slot == entry.results[0]
    alone = len([a for a in entry.args if isinstance(a, Ref)]) == 1
    plain = (entry.name in _MOVES and values) or (entry.name in _ELEMENTWISE and alone) or entry.name in _JOINS
    if not plain or not entry.args or not isinstance(entry.args[0], Ref):
        return f"the result of {entry.name} of shape {shape}"
    return f"a tensor of shape {shape} that is written to" if log.writers(slot, at) else entry


def unexplained(log: Log, mask: RowMask, is_ids: IsIds) -> str | None:
    """What the mask reads beside the ids; None where each element is a function of one id.

    Probes that choose every expert show what such a mask does, wherever it stands around the layers.
    """
    path = _walk(log, mask.operand, mask.entry, is_ids)
    return f"experts' rows are masked by more than their expert ids: {path}" if isinstance(path, str) else None


def unproved(log: Log, mask: RowMask, is_ids: IsIds, experts: int) -> str | None:
    """Why the mask may clear more than the rows of ids outside 0..experts-1; None where it is proved that it does not.

    `is_ids` tells the tensors that hold the ids. Each element of the mask is a function of one id, so that asking for
    every id asks for everything.
    """
    path = _walk(log, mask.operand, mask.entry, is_ids)
    if isinstance(path, str):
        return f"experts' rows are masked by more than their expert ids: {path}"
    try:
        kept = {slot: _constant(log, path, slot, range(experts), None) for slot in path.joined}
        cleared = next((e for e in range(experts) if not _is(log, path, mask.operand, e, mask.kept)), None)
        odd = None in kept.values()
        halves = not all(_constant(log, path, mask.operand, [e], (0.0, 1.0)) is not None for e in (-1, experts))
    except (RuntimeError, ValueError, KeyError, TypeError, IndexError) as error:
        return f"the mask over experts' rows cannot be run again: {error}"
    if cleared is not None:
        return f"the rows of expert {cleared} are masked"
    if odd or halves:
        return "the mask over experts' rows is no plain choice by their expert ids"
    return None


def _ask(log: Log, path: _Path, slot: int, expert: int) -> torch.Tensor:
    """The tensor's values where all ids are `expert`."""
    given = {ids: torch.full_like(log.tensors[ids], expert) for ids in path.ids}
    return given[slot] if slot in given else replay(log, path.steps, given, slot)


def _is(log: Log, path: _Path, slot: int, expert: int, value: float) -> bool:
    return bool((_ask(log, path, slot, expert) == value).all())


def _constant(
    log: Log, path: _Path, slot: int, experts: Collection[int], among: tuple[float, ...] | None
) -> float | None:
    """The one value that the tensor has whichever of the experts is asked for, where there is one."""
    found = {float(v) for e in experts for v in _ask(log, path, slot, e).unique().tolist()}
    return found.pop() if len(found) == 1 and (among is None or found <= set(among)) else None
