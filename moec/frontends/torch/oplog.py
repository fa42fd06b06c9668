"""The op log: everything one eager run of a block did, as dataflow between tensors.

A tensor is named by its memory (storage, offset, shape, stride, dtype), not by its Python object: autograd re-wraps
objects, and an alias of a tensor is the same value. Written storages keep a copy after each write, so the value of a
tensor at any moment of the run can be asked for.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moec.frontends.torch.extent import Extent
from moec.trees import tree_flatten, tree_map

HOST_READ = "host_read"
# A copy of a written storage larger than this is not kept: such tensors are never rows, weights or outputs of a probe.
_HISTORY_LIMIT = 64 << 20


@dataclass(frozen=True)
class Ref:
    """A tensor of the log, by its slot."""

    slot: int


_PLAIN = frozenset(
    {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, slice, type(...)}
)


def slots(tree: Any) -> tuple[int, ...]:
    """The slots in a tree, in order."""
    found: list[int] = []
    todo = [tree]
    while todo:
        item = todo.pop()
        kind = type(item)
        if kind is Ref:
            found.append(item.slot)
        elif kind is tuple or kind is list:
            todo.extend(reversed(item))
        elif kind is dict:
            todo.extend(reversed(item.values()))
        elif kind not in _PLAIN:
            leaves = tree_flatten(item)[0]
            found.extend(leaf.slot for leaf in leaves if isinstance(leaf, Ref))
    return tuple(found)


@dataclass(frozen=True)
class Entry:
    """One ATen call, or one read of a tensor's values on the host (`op == HOST_READ`)."""

    index: int
    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: Any
    writes: tuple[int, ...]

    @functools.cached_property
    def reads(self) -> tuple[int, ...]:
        return slots((self.args, self.kwargs))

    @functools.cached_property
    def results(self) -> tuple[int, ...]:
        return slots(self.outs)

    @property
    def name(self) -> str:
        return self.op if isinstance(self.op, str) else str(self.op.overloadpacket.__name__)


@dataclass
class Site:
    """One call of a module's `forward` or of another of its methods, and the entries [start, end) it covers."""

    path: str
    method: str
    module: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    start: int
    parent: Site | None
    end: int = -1
    result: Any = None
    assigned: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Plain attributes of the module that the call changed: name -> (before, after)."""

    @property
    def label(self) -> str:
        return self.path if self.method == "forward" else f"{self.path}.{self.method}"

    def covers(self, indices: Sequence[int]) -> bool:
        return all(self.start <= i < self.end for i in indices)


@dataclass
class Log:
    """Entries, sites and tensors of one run."""

    entries: list[Entry] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    tensors: list[torch.Tensor] = field(default_factory=list)
    storages: list[int] = field(default_factory=list)
    params: dict[int, str] = field(default_factory=dict)
    owned: dict[str, torch.Tensor] = field(default_factory=dict)
    result: Any = None
    contained: frozenset[str] = frozenset()
    """Attributes that the run set, each within calls of its own module alone."""
    asserting: bool = False
    """Set while code looks at values only to check them."""

    def __post_init__(self) -> None:
        self._slots: dict[Any, int] = {}
        self._makers: dict[int, list[int]] = {}
        self._writers: dict[int, list[int]] = {}
        self._extents: dict[int, Extent] = {}
        self._history: dict[int, list[tuple[int, torch.Tensor | None]]] = {}
        self._readers: dict[int, list[Entry]] = {}
        self._indexed: list[Entry] = []

    # -- recording ----------------------------------------------------------------------------------------------------
    def own(self, name: str, tensor: torch.Tensor) -> None:
        """Name a tensor that the module itself holds; the first name of a storage stays."""
        storage = tensor.untyped_storage()._cdata
        if storage not in self.params:
            self.params[storage] = name
            self.owned[name] = tensor

    def slot(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()._cdata
        key = (storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        found = self._slots.get(key)
        if found is None:
            found = self._slots[key] = len(self.tensors)
            self.tensors.append(tensor)
            self.storages.append(storage)
        return found

    def refs(self, tree: Any) -> Any:
        """The tree with its tensors replaced by their slots. Plain containers are the hot path of recording."""
        kind = type(tree)
        if isinstance(tree, torch.Tensor):
            return Ref(self.slot(tree))
        if kind in _PLAIN:
            return tree
        if kind is tuple or kind is list:
            return kind([self.refs(v) for v in tree])
        if kind is dict:
            return {k: self.refs(v) for k, v in tree.items()}
        return tree_map(lambda v: Ref(self.slot(v)) if isinstance(v, torch.Tensor) else v, tree)

    def before_write(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._history:
            self._history[storage._cdata] = [(-1, _flat_copy(tensor))]

    def append(self, op: Any, args: Any, kwargs: Any, outs: Any, written: Sequence[torch.Tensor]) -> None:
        index = len(self.entries)
        known = len(self.tensors)
        entry = Entry(
            index, op, self.refs(args), self.refs(kwargs), self.refs(outs), tuple(self.slot(t) for t in written)
        )
        for slot in dict.fromkeys(entry.results):
            if slot not in entry.reads and (slot >= known or slot in self._makers):
                self._makers.setdefault(slot, []).append(index)
        for tensor in written:
            storage = tensor.untyped_storage()._cdata
            self._writers.setdefault(storage, []).append(index)
            self._history[storage].append((index, _flat_copy(tensor)))
        self.entries.append(entry)

    # -- asking -------------------------------------------------------------------------------------------------------
    def producer(self, slot: int) -> int | None:
        """Index of the entry that made the tensor; None for parameters, inputs and constants."""
        made = self._makers.get(slot)
        return made[0] if made else None

    def makers(self, slot: int, before: int) -> list[int]:
        """All entries before `before` whose result is the tensor: the same view may be taken more than once."""
        return [i for i in self._makers.get(slot, ()) if i < before]

    def writers(self, slot: int, before: int, within: Extent | None = None) -> list[int]:
        """Entries before `before` that wrote into the tensor's memory, or into the part of it that is `within`."""
        every = self._writers.get(self.storages[slot])
        if not every:
            return []
        found = every[: bisect.bisect_left(every, before)]
        if not found:
            return found
        storage, part = self.storages[slot], within or self.extent(slot)
        return [
            i
            for i in found
            if any(self.storages[s] == storage and self.extent(s).meets(part) for s in self.entries[i].writes)
        ]

    def extent(self, slot: int) -> Extent:
        """Where in its storage the tensor lies."""
        found = self._extents.get(slot)
        if found is None:
            found = self._extents[slot] = Extent.of(self.tensors[slot])
        return found

    def value(self, slot: int, at: int | None = None) -> torch.Tensor | None:
        """The tensor as it was just before entry `at` (default: at the end); None if it was too large to keep."""
        tensor = self.tensors[slot]
        history = self._history.get(self.storages[slot])
        if history is None:
            return tensor
        moment = len(self.entries) if at is None else at
        flat = next(copy for i, copy in reversed(history) if i < moment)
        return (
            None
            if flat is None
            else flat.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        )

    def param_of(self, slot: int) -> str | None:
        """Name of the parameter (or buffer) whose storage the tensor lies in."""
        return self.params.get(self.storages[slot])

    def is_literal(self, slot: int) -> bool:
        """Whether the tensor is a torch.tensor(...) that the code made of Python numbers."""
        return any(entry.name == "lift_fresh" and slot in entry.reads for entry in self.entries)

    def closure(
        self, wanted: Sequence[tuple[int, int]], stop: Mapping[int, int] | None = None, start: int = 0
    ) -> set[int]:
        """Entries from `start` on that (slot, moment) values depend on.

        `stop` maps a slot to the entry after which its value is taken as given: what made it is not looked at, what was
        written into it later is.
        """
        stop = stop or {}
        given: dict[int, int] | None = None  # by storage; made when first asked for, as few tensors are written to
        seen: set[tuple[int, Extent | None]] = set()
        todo: list[tuple[int, int, Extent | None]] = [(slot, at, None) for slot, at in wanted]
        while todo:
            slot, at, within = todo.pop()
            sources: list[tuple[int, Extent | None]] = []
            written = self.writers(slot, at, within)
            if written:
                given = {self.storages[s]: moment for s, moment in stop.items()} if given is None else given
                since = given.get(self.storages[slot], -1)
                sources = [(i, None) for i in written if i > since]
            made = self.producer(slot)
            if made is not None and made < at and slot not in stop:
                sources.append((made, within or self.extent(slot)))
            for index, part in sources:
                if index >= start and (index, part) not in seen:
                    seen.add((index, part))
                    # Of what a view is taken from, only the part that the view shows matters.
                    todo.extend(
                        (read, index, part if self.storages[read] == self.storages[slot] else None)
                        for read in self.entries[index].reads
                    )
        return {index for index, _ in seen}

    def consumers(self, slot: int) -> Iterator[Entry]:
        """Entries that read the tensor, in order."""
        if len(self._indexed) != len(self.entries):
            self._readers = {}
            self._indexed = self.entries[:]
            for entry in self.entries:
                for read in dict.fromkeys(entry.reads):
                    self._readers.setdefault(read, []).append(entry)
        return iter(self._readers.get(slot, ()))

    def users_behind(self, slot: int, after: int, moves: Collection[str]) -> list[Entry]:
        """The entries after `after` that use the tensor, looking through ops in `moves`, which only rearrange it."""
        known, todo, users = {slot}, [slot], {}
        while todo:
            current = todo.pop()
            for entry in self.consumers(current):
                if entry.index <= after:
                    continue
                if entry.name not in moves or len(entry.results) != 1 or current not in entry.reads[:1]:
                    users[entry.index] = entry
                elif entry.results[0] not in known:
                    known.add(entry.results[0])
                    todo.append(entry.results[0])
        return [users[i] for i in sorted(users)]


def _flat_copy(tensor: torch.Tensor) -> torch.Tensor | None:
    storage = tensor.untyped_storage()
    if storage.nbytes() > _HISTORY_LIMIT:
        return None
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
    return flat.clone()
