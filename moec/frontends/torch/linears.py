"""Matrix products of a log whose weight is a view of one of the user's parameters.

R rows, C inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from moec.frontends.torch.oplog import Entry, Log, Ref
from moec.weights import View

_VIEWS = frozenset({"view", "_unsafe_view", "reshape", "squeeze", "unsqueeze"})


@dataclass(frozen=True)
class Linear:
    """`out = source @ weight.T + bias`: source [R, C] (or [C]), weight a View [N, C], out [R, N]."""

    entry: int
    source: int
    weight: View
    bias: View | None
    out: int
    last: int


def view_of(log: Log, slot: int, layouts: Mapping[str, torch.Tensor]) -> View | None:
    """The parameter view a slot is, None if its memory is not a parameter's."""
    name = log.param_of(slot)
    if name is None or name not in layouts:
        return None
    tensor = log.tensors[slot]
    offset = int(tensor.storage_offset() - layouts[name].storage_offset())
    return View(name, offset, tuple(tensor.shape), tuple(tensor.stride()))


def _matrix(view: View | None) -> View | None:
    """A [C, N] operand as [N, C]; a leading batch of one is dropped."""
    if view is None:
        return None
    shape, stride = view.shape, view.stride
    if len(shape) == 3 and shape[0] == 1:
        shape, stride = shape[1:], stride[1:]
    return replace(view, shape=shape[::-1], stride=stride[::-1]) if len(shape) == 2 else None


def vector_of(view: View | None, size: int) -> View | None:
    """A vector, possibly broadcast, as [N]."""
    if (
        view is None
        or not view.shape
        or view.shape[-1] != size
        or any(n != 1 and s != 0 for n, s in zip(view.shape[:-1], view.stride, strict=False))
    ):
        return None
    return View(view.param, view.offset, (size,), (view.stride[-1],))


def _plain(entry: Entry) -> bool:
    return not any(k in entry.kwargs for k in ("beta", "alpha", "out_dtype")) and all(
        isinstance(a, Ref) for a in entry.args
    )


class LinearFinder:
    """Finds the products with weights accepted by `is_weight(parameter name)` in a range of entries."""

    def __init__(self, log: Log, params: dict[str, torch.Tensor], is_weight: Callable[[str], bool]) -> None:
        self.log, self.params, self.is_weight = log, params, is_weight

    def view(self, slot: int) -> View | None:
        found = view_of(self.log, slot, self.params)
        return found if found is not None and self.is_weight(found.param) else None

    def vector(self, slot: int, size: int) -> View | None:
        """A bias of `size` outputs: any parameter serves, whatever its name."""
        return vector_of(view_of(self.log, slot, self.params), size)

    def find(self, start: int, end: int) -> list[Linear]:
        found = [linear for e in self.log.entries[start:end] if (linear := self._linear(e)) is not None]
        return [self._with_bias(linear, end) for linear in found]

    def _linear(self, entry: Entry) -> Linear | None:
        if not _plain(entry) or len(entry.results) != 1:
            return None
        slots = [a.slot for a in entry.args]
        out = entry.results[0]
        match entry.name, len(slots):
            case (("mm" | "bmm"), 2):
                return self._product(entry, slots[0], slots[1], None, out)
            case (("addmm" | "baddbmm"), 3):
                return self._product(entry, slots[1], slots[2], slots[0], out)
            case "linear", (2 | 3):
                weight = self.view(slots[1])
                bias = self.vector(slots[2], weight.shape[0]) if weight and len(slots) == 3 else None
                if weight is None or len(weight.shape) != 2 or (len(slots) == 3 and bias is None):
                    return None
                return Linear(entry.index, slots[0], weight, bias, out, entry.index)
            case (("mv" | "addmv"), (2 | 3)):
                weight = self.view(slots[-2])
                bias = self.vector(slots[0], weight.shape[0]) if weight and len(slots) == 3 else None
                if weight is None or (len(slots) == 3 and bias is None):
                    return None
                return Linear(entry.index, slots[-1], weight, bias, out, entry.index)
        return None

    def _product(self, entry: Entry, source: int, operand: int, bias_slot: int | None, out: int) -> Linear | None:
        weight = _matrix(self.view(operand))
        if weight is None:
            return None
        bias = self.vector(bias_slot, weight.shape[0]) if bias_slot is not None else None
        if bias_slot is not None and bias is None:
            return None
        return Linear(entry.index, source, weight, bias, out, entry.index)

    def _with_bias(self, linear: Linear, end: int) -> Linear:
        """Take a bias that is added in an op of its own, when nothing else reads the sum without it."""
        if linear.bias is not None:
            return linear
        users = [e for e in self.log.users_behind(linear.out, linear.last, _VIEWS) if e.index < end]
        if not users or (len(users) > 1 and users[0].name != "add_"):
            return linear
        bias = self._added(users[0], linear.weight.shape[0])
        return linear if bias is None else replace(linear, bias=bias, out=users[0].results[0], last=users[0].index)

    def _added(self, entry: Entry, size: int) -> View | None:
        """The bias that an addition adds."""
        slots = [a.slot for a in entry.args if isinstance(a, Ref)]
        if entry.name not in ("add", "add_") or entry.kwargs or len(slots) != 2 or len(entry.args) != 2:
            return None
        return self.vector(slots[1], size) or (self.vector(slots[0], size) if entry.name == "add" else None)
