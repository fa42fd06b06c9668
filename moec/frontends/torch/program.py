"""The host program around sliced experts: the block's own operations, made to hold at any size.

Built from two or more logs of one block at different shapes. Operations must be the same, integers that differ must be
size expressions of the input, everything else must be equal; parameters and buffers are read live.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moec.frontends.torch.instances import NotLifted
from moec.frontends.torch.items import Item
from moec.frontends.torch.oplog import Log, Ref, slots
from moec.frontends.torch.sizes import Size, solve
from moec.trees import tree_flatten, tree_unflatten


@dataclass(frozen=True)
class Live:
    """A parameter or buffer, read from the module on each call."""

    name: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    owner_shape: tuple[int, ...]
    owner_stride: tuple[int, ...]


@dataclass(frozen=True)
class SizeOf:
    """`times` the size of an axis of a tensor that the block made before, such as the places that its router gave."""

    slot: int
    axis: int
    times: int


@dataclass(frozen=True)
class Step:
    """One operation, or one call of the submodule at `path`; `outs` are the slots it fills."""

    op: Any
    path: str | None
    arguments: Any
    outs: tuple[int | None, ...]
    text: str


_RESHAPES = frozenset({"view", "_unsafe_view", "reshape"})


class Aligned:
    """Slots of several logs of one block, matched to the slots of the first."""

    def __init__(self, logs: Sequence[Log], shapes: Sequence[tuple[int, ...]], prefix: str) -> None:
        self.logs, self.shapes = logs, shapes
        self.prefix = f"{prefix}." if prefix else ""
        # What is one tensor in the first log, such as a view taken twice, may be several in another.
        self.match: dict[int, dict[tuple[int, ...], None]] = {}

    def tie(self, trees: Sequence[Any]) -> None:
        """The tensors of these trees (one per log) correspond."""
        for same in zip(*(slots(tree) for tree in trees), strict=True):
            self.match.setdefault(same[0], {})[same] = None

    def step(self, items: Sequence[Item]) -> Step:
        """One step from the corresponding items of all logs."""
        head = items[0]
        if any(item.name != head.name for item in items):
            raise NotLifted(
                f"{head.name} at one shape is {next(i.name for i in items if i.name != head.name)} at another"
            )
        given: Sequence[Any] = [item.arguments for item in items]
        if head.name in _RESHAPES:
            given = self._inferred(given)
        arguments = self.tree(given, head.name)
        self.tie([item.outputs for item in items])
        outs = tuple(leaf.slot if isinstance(leaf, Ref) else None for leaf in tree_flatten(head.outputs)[0])
        path = head.site.path.removeprefix(self.prefix) if head.site is not None else None
        return Step(self._op(head), path, arguments, outs, head.name)

    def _op(self, item: Item) -> Any:
        """The operation; a view that nobody writes through may be a copy, for inputs whose strides allow no view."""
        if item.entry is None:
            return None
        log = self.logs[0]
        alone = item.name == "view" and not log.writers(item.results[0], len(log.entries))
        return torch.ops.aten.reshape.default if alone else item.entry.op

    def _inferred(self, trees: Sequence[Any]) -> Sequence[Any]:
        """Sizes of a reshape with -1 for the one that is no size of the input: it follows from the others."""
        sizes = [args[1] if len(args) > 1 else () for args, _ in trees]
        if len({len(size) for size in sizes}) != 1:
            return trees
        unknown = [i for i, same in enumerate(zip(*sizes, strict=True)) if solve(same, self.shapes) is None]
        if len(unknown) != 1:
            return trees
        inferred = [[-1 if i == unknown[0] else n for i, n in enumerate(size)] for size in sizes]
        return [((args[0], size, *args[2:]), kwargs) for (args, kwargs), size in zip(trees, inferred, strict=True)]

    def tree(self, trees: Sequence[Any], where: str) -> Any:
        """The first tree with its leaves made to hold at every shape."""
        flat = [tree_flatten(tree) for tree in trees]
        if any(spec != flat[0][1] for _, spec in flat):
            raise NotLifted(f"{where} is called differently at different shapes")
        leaves = [self._leaf(values, where) for values in zip(*(f[0] for f in flat), strict=True)]
        return tree_unflatten(leaves, flat[0][1])

    def _leaf(self, values: Sequence[Any], where: str) -> Any:
        if all(isinstance(v, Ref) for v in values):
            return self._tensor([v.slot for v in values], where)
        if all(type(v) is int for v in values):
            size: int | Size | SizeOf | None = solve(values, self.shapes)
            size = self._size_of(values) if size is None else size
            if size is None:
                raise NotLifted(f"{where} takes {values[0]}, {values[1]} at two shapes, which is no size of the input")
            return size
        if any(type(v) is not type(values[0]) for v in values) or any(isinstance(v, Ref) for v in values):
            raise NotLifted(f"{where} takes arguments of different kinds at different shapes")
        first = values[0]
        if any(v is not first and not _same(v, first) for v in values):
            raise NotLifted(
                f"{where} takes {first!r}, {next(v for v in values if not _same(v, first))!r} at two shapes"
            )
        return first

    def _size_of(self, values: Sequence[int]) -> SizeOf | None:
        """The integers as the size of one axis of a tensor that is there, or as a number of times that."""
        if not all(values):
            return None
        for slot, matched in self.match.items():
            for same in matched:
                shapes = [log.tensors[s].shape for log, s in zip(self.logs, same, strict=True)]
                for axis in range(min(map(len, shapes))):
                    times = {value / (shape[axis] or 0.3) for value, shape in zip(values, shapes, strict=True)}
                    if len(times) == 1 and next(iter(times)) >= 1 and next(iter(times)).is_integer():
                        return SizeOf(slot, axis, int(times.pop()))
        return None

    def _tensor(self, same: list[int], where: str) -> Any:
        if tuple(same) in self.match.get(same[0], ()):
            return Ref(same[0])
        names = {log.param_of(slot) for log, slot in zip(self.logs, same, strict=True)}
        tensor = self.logs[0].tensors[same[0]]
        name = next(iter(names))
        if len(names) == 1 and name is not None and name.startswith(self.prefix):
            owner = self.logs[0].owned[name]
            offset = int(tensor.storage_offset() - owner.storage_offset())
            layouts = (tuple(tensor.shape), tuple(tensor.stride()), tuple(owner.shape), tuple(owner.stride()))
            return Live(name.removeprefix(self.prefix), offset, *layouts)
        # A literal in the code, torch.tensor(...), comes in through lift_fresh; any other tensor may be written later.
        constant = where == "lift_fresh"
        if (
            names == {None}
            and constant
            and all(_equal(log.tensors[s], tensor) for log, s in zip(self.logs, same, strict=True))
        ):
            return tensor.clone()
        shape = tuple(tensor.shape)
        if self.logs[0].is_literal(same[0]):
            raise NotLifted(
                f"{where} reads a torch.tensor(...) of shape {shape} that the block's code makes of Python numbers; "
                "make it a buffer"
            )
        raise NotLifted(
            f"{where} reads a tensor of shape {shape} that is neither computed from the input nor a parameter"
        )


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def _same(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except Exception:  # a user's object may compare as it likes
        return False
