"""What Python objects hold, remembered: containers, attributes, arrays, tensors and generators, a few levels deep.

Says which of them a run changed, and puts them back. Functions, classes, Python modules and objects of libraries'
machinery are not entered.
"""

from __future__ import annotations

import collections
import functools
import logging
import pickle
import random
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import BuiltinMethodType, CellType, FunctionType, MethodType, ModuleType
from typing import Any, Protocol

import torch

_DEPTH = 5
_MOST_OBJECTS = 5000
_LARGEST_COPY = 1 << 24
_CONTAINERS = (list, dict, set, collections.deque)
_SIMPLE = (int, float, complex, str, bool, bytes, torch.dtype, torch.device, type(None), torch.Size)
_PLAIN = frozenset(_SIMPLE)
_BUILT_IN = frozenset({list, dict, set, collections.OrderedDict})
_CLOSED = (type, ModuleType, FunctionType, logging.Logger, weakref.ref, torch.nn.Module)
_MACHINERY = frozenset({"torch", "moec", "threading", "logging", "concurrent", "asyncio", "multiprocessing", "weakref"})


class Entry(Protocol):
    """One object as it was."""

    def changed(self) -> Iterator[str]:
        """Paths of what differs now."""
        ...

    def undo(self) -> None: ...


def version(tensor: torch.Tensor) -> int:
    """Rises with each write in place; tensors made under inference_mode keep no count."""
    lazy = isinstance(tensor, torch.nn.parameter.UninitializedParameter | torch.nn.parameter.UninitializedBuffer)
    return 0 if lazy or tensor.is_inference() else tensor._version


def same(now: Any, before: Any) -> bool:
    """The same object, or an equal simple value."""
    if now is before:
        return True
    if isinstance(now, tuple) and type(now) is type(before) and len(now) == len(before):
        return all(map(same, now, before))
    return isinstance(now, _SIMPLE) and type(now) is type(before) and bool(now == before)


@dataclass(frozen=True)
class _Contents:
    """A container. Subclasses may look things up in ways of their own, and make what is asked for: not so here."""

    path: str
    value: Any
    before: tuple[Any, ...]

    def changed(self) -> Iterator[str]:
        now = _items(self.value)
        if len(now) != len(self.before) or not all(map(same, now, self.before)):
            yield self.path

    def undo(self) -> None:
        if not any(self.changed()):
            return
        self.value.clear()
        if isinstance(self.value, dict):
            for key, item in self.before:
                self.value[key] = item
        else:
            (self.value.update if isinstance(self.value, set) else self.value.extend)(self.before)


@dataclass(frozen=True)
class Bindings:
    """Names of a table; `names` limits which, `write` and `remove` change them."""

    path: str
    table: Mapping[str, Any]
    copy: Mapping[str, Any]
    write: Callable[[str, Any], None]
    remove: Callable[[str], None]
    names: frozenset[str] | None = None

    def _changed(self) -> list[str]:
        names = self.names if self.names is not None else {*self.table, *self.copy}
        missing = object()
        return [n for n in names if not same(self.table.get(n, missing), self.copy.get(n, missing))]

    def changed(self) -> Iterator[str]:
        yield from (f"{self.path}{name}" for name in sorted(self._changed()) if name in {*self.table, *self.copy})

    def undo(self) -> None:
        for name in self._changed():
            if name in self.copy:
                self.write(name, self.copy[name])
            elif name in self.table:
                self.remove(name)


@dataclass(frozen=True)
class _State:
    """Something that says its state and takes it back: a generator, a closure's cell, an array, a tensor."""

    path: str
    read: Callable[[], Any]
    write: Callable[[Any], Any]
    before: Any
    equal: Callable[[Any, Any], bool]

    def changed(self) -> Iterator[str]:
        if not self.equal(self.read(), self.before):
            yield self.path

    def undo(self) -> None:
        if not self.equal(self.read(), self.before):
            self.write(self.before)


class Snapshot:
    """Objects reachable from those that are added; each is remembered once, under the first path to it."""

    def __init__(self) -> None:
        self._entries: list[tuple[str, Entry]] = []
        self._seen: dict[int, Any] = {}

    def changes(self) -> list[str]:
        """One phrase for each difference, in the order in which the objects were added."""
        return list(dict.fromkeys(f"{phrase} {path!r}" for phrase, entry in self._entries for path in entry.changed()))

    def undo(self) -> None:
        """Put everything back."""
        for _, entry in self._entries:
            entry.undo()

    def bind(
        self, phrase: str, path: str, owner: Any, names: Iterable[str] | None = None, *, into: bool = True
    ) -> None:
        """Remember the names of a class, an object or a table of globals, and what they hold."""
        table: Mapping[str, Any] = owner if isinstance(owner, dict) else vars(owner)
        chosen = None if names is None else frozenset(names)
        kept = {n: v for n, v in table.items() if chosen is None or n in chosen}
        if isinstance(owner, dict):
            self._entries.append(
                (phrase, Bindings(path, table, kept, owner.__setitem__, lambda name: owner.pop(name, None), chosen))
            )
        else:
            write, remove = functools.partial(setattr, owner), functools.partial(delattr, owner)
            self._entries.append((phrase, Bindings(path, table, kept, write, remove, chosen)))
        if into:
            for name, value in kept.items():
                self.add(phrase, f"{path}{name}", value)

    def add(self, phrase: str, path: str, value: Any, depth: int = _DEPTH) -> None:
        """Remember what `value` holds."""
        kind = type(value)
        if kind in _PLAIN:  # most of what modules hold: numbers, words, and containers of hooks with nothing in them
            return
        if kind in _BUILT_IN and not value and depth and id(value) not in self._seen:
            if len(self._seen) <= _MOST_OBJECTS:
                self._seen[id(value)] = value
                self._entries.append((phrase, _Contents(path, value, ())))
            return
        if isinstance(value, _SIMPLE) or id(value) in self._seen or not depth or len(self._seen) > _MOST_OBJECTS:
            return
        self._seen[id(value)] = value  # kept alive, so that its id stays its own
        if isinstance(value, MethodType | BuiltinMethodType):
            self.add(phrase, path, value.__self__, depth)
        elif isinstance(value, functools.partial):
            self.add(phrase, path, (value.func, value.args, value.keywords), depth)
        elif isinstance(value, tuple | frozenset):
            for i, item in enumerate(value):
                self.add(phrase, f"{path}[{i}]", item, depth - 1)
        elif isinstance(value, _CONTAINERS):
            self._entries.append((phrase, _Contents(path, value, _items(value))))
            for key, item in _keyed(value):
                self.add(phrase, f"{path}[{key}]", item, depth - 1)
        elif (state := _state_of(path, value)) is not None:
            self._entries.append((phrase, state))
        elif not isinstance(value, _CLOSED) and type(value).__module__.partition(".")[0] not in _MACHINERY:
            self._add_object(phrase, path, value, depth)

    def _add_object(self, phrase: str, path: str, value: Any, depth: int) -> None:
        if hasattr(value, "__dict__"):
            self.bind(phrase, f"{path}.", value, into=False)
            for name, held in list(vars(value).items()):
                self.add(phrase, f"{path}.{name}", held, depth - 1)
        slots = [n for c in type(value).__mro__ for n in _words(getattr(c, "__slots__", ())) if hasattr(value, n)]
        for name in slots:
            held = getattr(value, name)
            read, write = functools.partial(getattr, value, name), functools.partial(setattr, value, name)
            self._entries.append((phrase, _State(f"{path}.{name}", read, write, held, same)))
            self.add(phrase, f"{path}.{name}", held, depth - 1)


def _words(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(n for n in slots if n not in ("__dict__", "__weakref__"))


def _items(value: Any) -> tuple[Any, ...]:
    return tuple(dict.items(value)) if isinstance(value, dict) else tuple(value)


def _keyed(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(repr(k) if isinstance(k, str | int) else "...", v) for k, v in dict.items(value)]
    return [(str(i), v) for i, v in enumerate(value)]


def _state_of(path: str, value: Any) -> Entry | None:
    """The entry of a value whose state is read and written as a whole."""
    if isinstance(value, torch.Tensor):
        return _tensor(path, value)
    if isinstance(value, torch.Generator):
        restore: Callable[[Any], Any] = value.set_state
        return _State(path, value.get_state, restore, value.get_state(), torch.equal)
    if isinstance(value, random.Random):
        return _State(path, value.getstate, value.setstate, value.getstate(), lambda a, b: a == b)
    if isinstance(value, CellType):
        return _cell(path, value)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray) and value.nbytes <= _LARGEST_COPY:
        write = functools.partial(numpy.copyto, value)
        return _State(path, lambda: value, write, value.copy(), lambda a, b: a.tobytes() == b.tobytes())
    if numpy is not None and isinstance(value, numpy.random.Generator):
        bits = value.bit_generator
        write = functools.partial(setattr, bits, "state")
        return _State(path, lambda: bits.state, write, bits.state, _alike)
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        return _State(path, value.get_state, value.set_state, value.get_state(), _alike)
    return None


def _alike(a: Any, b: Any) -> bool:
    """For states of generators, which hold arrays."""
    return pickle.dumps(a) == pickle.dumps(b)


def _tensor(path: str, tensor: torch.Tensor) -> Entry | None:
    """Parameters are not copied: nothing writes to those in a forward, and they are large."""
    if tensor.is_meta or type(tensor) is not torch.Tensor:
        return None
    held = tensor.detach()
    copy = held.clone() if tensor.numel() <= _LARGEST_COPY else None
    before = version(tensor)

    def restore(_: Any) -> None:
        if copy is not None:
            held.copy_(copy)

    def equal(now: int, then: int) -> bool:
        # After an undo the count of writes differs, and the values do not.
        return now == then or (copy is not None and torch.equal(held, copy))

    return _State(path, lambda: version(tensor), restore, before, equal)


def _cell(path: str, cell: CellType) -> Entry | None:
    try:
        before = cell.cell_contents
    except ValueError:
        return None
    return _State(path, lambda: cell.cell_contents, functools.partial(setattr, cell, "cell_contents"), before, same)
