"""Weights of a region that come as operands of a call instead of from a module: where each lies among those.

E experts. What says so is plain data, so that it can stand in a graph as text.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch

from moec.errors import MoecError
from moec.weights import View


@dataclass(frozen=True)
class Bank:
    """One weight: strided views of operands, at (operand, offset) for each expert, or one view that all share."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    places: tuple[tuple[int, int], ...]
    each: bool

    def to_data(self) -> list[Any]:
        """Lists and numbers; evenly spaced places as their first, their steps and their number."""
        (param, offset), count = self.places[0], len(self.places)
        steps = [b - a for a, b in zip(self.places[0], self.places[1], strict=True)] if count > 1 else [0, 0]
        even = tuple((param + i * steps[0], offset + i * steps[1]) for i in range(count))
        places = [param, offset, *steps, count] if even == self.places else [list(p) for p in self.places]
        return [list(self.shape), list(self.stride), places, self.each]

    @classmethod
    def of(cls, data: Sequence[Any]) -> Bank:
        """What `to_data` was given."""
        shape, stride, places, each = data
        if isinstance(places[0], int):
            param, offset, by, step, count = places
            places = [(param + i * by, offset + i * step) for i in range(count)]
        return cls(tuple(shape), tuple(stride), tuple((p, o) for p, o in places), each)


@dataclass(frozen=True)
class Table:
    """The banks by reference, and the shape and strides that each operand must have."""

    banks: Mapping[str, Bank]
    layouts: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


def table_of(views: Mapping[str, View | tuple[View, ...]], layouts: Mapping[str, Any]) -> tuple[Table, tuple[str, ...]]:
    """The table for views of named parameters, and the parameters in the order of the operands."""
    entries = {ref: entry if isinstance(entry, tuple) else (entry,) for ref, entry in views.items()}
    names = list(dict.fromkeys(view.param for entry in entries.values() for view in entry))
    index = {name: i for i, name in enumerate(names)}
    banks = {
        ref: Bank(
            entry[0].shape,
            entry[0].stride,
            tuple((index[v.param], v.offset) for v in entry),
            isinstance(views[ref], tuple),
        )
        for ref, entry in entries.items()
    }
    return Table(banks, tuple((layouts[n].shape, layouts[n].stride) for n in names)), tuple(names)


def is_expressible(views: Mapping[str, View | tuple[View, ...]]) -> bool:
    """Whether all experts of each weight lie in the same way in their parameters."""
    return all(len({(v.shape, v.stride) for v in entry}) == 1 for entry in views.values() if isinstance(entry, tuple))


class OperandStore:
    """A region's weights in the operands of the call that this thread is in."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._call = threading.local()
        self._lock = threading.Lock()
        self._seen: tuple[int, list[weakref.ref[torch.Tensor]]] = (0, [])

    def enter(self, tensors: Sequence[torch.Tensor]) -> None:
        """From now on, in this thread, the weights lie in these. Raises MOEC230 where one has another layout."""
        for i, (tensor, (shape, stride)) in enumerate(zip(tensors, self._table.layouts, strict=True)):
            if tensor.shape != shape or tensor.stride() != stride:
                raise MoecError(
                    "MOEC230",
                    f"weight {i} of a layer in a graph has shape {tuple(tensor.shape)}, strides {tensor.stride()}; "
                    f"it was compiled with {shape}, {stride}",
                    hint="trace the model again after changing the layout of parameters",
                )
        self._call.tensors = tensors

    def leave(self) -> None:
        """Let go of the tensors."""
        self._call.tensors = ()

    def _view(self, bank: Bank, place: tuple[int, int]) -> torch.Tensor:
        param, offset = place
        tensor: torch.Tensor = self._call.tensors[param]
        if offset == 0 and (bank.shape, bank.stride) == self._table.layouts[param]:
            return tensor
        return tensor.as_strided(bank.shape, bank.stride, tensor.storage_offset() + offset)

    def experts(self, ref: str) -> Sequence[torch.Tensor]:
        """One tensor for each of the E experts."""
        whole = self.stacked(ref)
        if whole is not None:
            return whole.unbind(0)
        bank = self._table.banks[ref]
        return [self._view(bank, place) for place in bank.places]

    def stacked(self, ref: str) -> torch.Tensor | None:
        """All experts as one view, or None where they are not evenly spaced in one operand."""
        bank = self._table.banks[ref]
        step = _even_step(bank)
        if step is None:
            return None
        param, offset = bank.places[0]
        shape, stride = (len(bank.places), *bank.shape), (step, *bank.stride)
        tensor: torch.Tensor = self._call.tensors[param]
        if offset == 0 and (shape, stride) == self._table.layouts[param]:
            return tensor
        return tensor.as_strided(shape, stride, tensor.storage_offset() + offset)

    def dense(self, ref: str) -> torch.Tensor:
        """A weight that is not per expert."""
        bank = self._table.banks[ref]
        if bank.each:
            raise MoecError("MOEC230", f"weight {ref!r} is per expert, a dense weight was expected")
        return self._view(bank, bank.places[0])

    def placement(self) -> Hashable:
        """Where the operands' memory is."""
        return tuple((t.data_ptr(), t.stride(), t.shape, t.dtype, t.device) for t in self._call.tensors)

    def version(self) -> Hashable:
        """Changes when an operand is another tensor, was moved, cast or written in place."""
        tensors = self._call.tensors
        with self._lock:
            number, seen = self._seen
            if len(seen) != len(tensors) or not all(map(is_, tensors, [ref() for ref in seen])):
                number += 1
                self._seen = number, [weakref.ref(t) for t in tensors]
        looks = tuple((t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype) for t in tensors)
        return number, looks


class LeafStore:
    """A region's weights in the operands of one call, as leaves of an autograd graph: one for each view.

    So an expert's gradient is as large as the expert, and not as the operand that holds them all.
    """

    def __init__(self, table: Table, tensors: Sequence[torch.Tensor], needed: Sequence[bool]) -> None:
        self._table, self._tensors, self._needed = table, tensors, needed
        self._leaves: dict[tuple[Any, ...], torch.Tensor] = {}

    def experts(self, ref: str) -> Sequence[torch.Tensor]:
        """One leaf for each of the E experts."""
        return _Leaves(self._table.banks[ref], self._leaf)

    def stacked(self, ref: str) -> torch.Tensor | None:
        """None: each expert is a leaf of its own."""
        return None

    def dense(self, ref: str) -> torch.Tensor:
        """A weight that is not per expert."""
        bank = self._table.banks[ref]
        return self._leaf(bank, bank.places[0])

    def placement(self) -> Hashable:
        """Nothing is kept between calls."""
        return None

    def version(self) -> Hashable:
        """Nothing is kept between calls."""
        return None

    def _leaf(self, bank: Bank, place: tuple[int, int]) -> torch.Tensor:
        key = (bank.shape, bank.stride, place)
        if key not in self._leaves:
            param, offset = place
            tensor = self._tensors[param].detach()
            view = tensor.as_strided(bank.shape, bank.stride, tensor.storage_offset() + offset)
            self._leaves[key] = view.requires_grad_(self._needed[param])
        return self._leaves[key]

    def gradients(
        self, y: torch.Tensor, others: Sequence[torch.Tensor], grad: torch.Tensor
    ) -> list[torch.Tensor | None]:
        """Of the `others`, None where y does not depend on one, and then of each operand that needs one."""
        own = [(key, leaf) for key, leaf in self._leaves.items() if leaf.requires_grad]
        asked = [*others, *(leaf for _, leaf in own)]
        found = torch.autograd.grad(y, asked, grad, allow_unused=True) if y.requires_grad else (None,) * len(asked)
        whole = {i: _zeros(self._tensors[i]) for i, need in enumerate(self._needed) if need}
        for (key, _), one in zip(own, found[len(others) :], strict=True):
            shape, stride, (param, offset) = key
            if one is not None:  # views of one operand may share memory
                whole[param].as_strided(shape, stride, offset).add_(one)
        return [*found[: len(others)], *(_as_empty_like(g, self._tensors[i]) for i, g in whole.items())]


class _Leaves(Sequence[torch.Tensor]):
    """Experts, each made a leaf when it is asked for: of many experts few are hit."""

    def __init__(self, bank: Bank, leaf: Callable[[Bank, tuple[int, int]], torch.Tensor]) -> None:
        self._bank, self._leaf = bank, leaf

    def __len__(self) -> int:
        return len(self._bank.places)

    def __getitem__(self, index: int) -> torch.Tensor:  # type: ignore[override]
        return self._leaf(self._bank, self._bank.places[index])


def _zeros(operand: torch.Tensor) -> torch.Tensor:
    """Zeros in an operand's own layout, from the start of their storage."""
    found = torch.zeros_like(operand)
    if found.stride() == operand.stride():
        return found
    extent = 1 + sum((n - 1) * step for n, step in zip(operand.shape, operand.stride(), strict=True))
    return operand.new_zeros(extent).as_strided(operand.shape, operand.stride())


def _as_empty_like(found: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
    """The values in the layout that `torch.empty_like` gives, which a fake of an operator may state."""
    wanted = torch.empty_like(operand)
    return found if found.stride() == wanted.stride() else wanted.copy_(found)


def _even_step(bank: Bank) -> int | None:
    """Distance between consecutive experts in one operand, None where there is no single one."""
    if not bank.each:
        return None
    (param, first), *rest = bank.places
    if any(p != param for p, _ in rest):
        return None
    if not rest:
        return max((n * s for n, s in zip(bank.shape, bank.stride, strict=True)), default=1)
    step = rest[0][1] - first
    even = step >= 0 and all(offset == first + i * step for i, (_, offset) in enumerate(rest, start=1))
    return step if even else None
