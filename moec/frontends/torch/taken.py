"""What a compiled layer takes for granted of the code it replaces: attributes, configurations, methods, globals.

`take` writes it down when the layer is compiled, with copies of the values. It names modules by path, so that it holds
for a copy of the model too.
"""

from __future__ import annotations

import copy
import enum
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from moec.frontends.torch.reads import Reads, assigned_to, classes_of, is_tensor_or_module, is_users, reads_of

_PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.Size)
_FIXED = (*_PLAIN, enum.Enum, FunctionType, BuiltinFunctionType, type, staticmethod, classmethod, property)
# Entries of a list or dict of plain values that are compared on each call; a longer one is a table, not a setting.
_MOST_ENTRIES = 64
_MACHINERY = frozenset({*nn.Module().__dict__, "moec"})


@dataclass(frozen=True)
class Row:
    """Plain values under `keys` of one table: a module's attributes (`path`), or those of an object it holds
    (`attribute`), or a class's or module's own (`table`). `absent` are names that only the class has."""

    owner: str
    keys: tuple[str, ...]
    values: tuple[Any, ...]
    path: str | None = None
    attribute: str = ""
    table: Mapping[str, Any] | None = None
    objects: tuple[tuple[str, type], ...] = ()
    absent: frozenset[str] = frozenset()


def take(module: nn.Module, method: str, paths: Iterable[str]) -> tuple[Row, ...]:
    """All that the method, and the forwards of the submodules at `paths`, may read of plain values."""
    parts = {"": module, **{path: module.get_submodule(path) for path in paths}}
    entered = [part for path, part in parts.items() if path or method == "forward"]
    reads = reads_of(getattr(type(module), method), parts.values(), entered)
    classes, forwards = classes_of(parts.values()), classes_of(entered)
    # A method that is overridden on an instance is another method; other names count where the class has them.
    shadows = frozenset(n for c in classes for n in reads.names & vars(c).keys())
    rows = [row for path, part in parts.items() for row in _of_module(path, part, method, reads, shadows)]
    rows += [_of_held(path, part, reads) for path, part in module.named_modules() if path not in parts]
    for cls in classes:
        if not cls.__module__.startswith("torch."):
            methods = reads.names - {"forward"} | {method} | ({"forward"} if cls in forwards else set())
            rows += _of_table(f"class {cls.__name__}", vars(cls), methods & vars(cls).keys(), reads)
    for table, names in reads.globals():
        home = str(table.get("__name__", ""))
        if not home.startswith("torch."):
            rows += _of_table(f"module {home}", table, names, reads)
    return tuple(row for row in rows if row.keys or row.absent or row.objects)


def _of_module(path: str, part: nn.Module, method: str, reads: Reads, shadows: frozenset[str]) -> Iterator[Row]:
    own = part.__dict__
    # The method itself is where the compiled one stands.
    names = {n for n in reads.names & own.keys() if n not in _MACHINERY and (path or n != method)}
    called = shadows | {"forward"} if path else shadows - {method}
    absent = frozenset(n for n in called if hasattr(type(part), n) and n not in own)
    keys, values, objects = _sorted_out(own, names)
    yield Row(path, keys, values, path, objects=objects, absent=absent)
    yield from _of_namespaces(own, names, reads)
    for name, _ in objects:
        inner, found, _ = _sorted_out(_attributes(own[name]), reads.of_object(name, _attributes(own[name])))
        yield Row(f"{path}.{name}".lstrip("."), inner, found, path, name)


def _of_held(path: str, part: nn.Module, reads: Reads) -> Row:
    """A submodule that is not run in the cut, but whose attributes its code may read: `self.experts.act(...)`.

    Elements of a list have no name in the code. What its own methods assign is a result of its calls, and no setting.
    """
    name, own = path.rpartition(".")[2], part.__dict__
    names = reads.of_object(name, own) if name.isdigit() else reads.behind(name) & own.keys()
    methods = (f for c in classes_of([part]) for n, f in vars(c).items() if n != "__init__")
    made = frozenset().union(*(assigned_to(f.__code__) for f in methods if isinstance(f, FunctionType)))
    keys, values, _ = _sorted_out(own, names - _MACHINERY - made)
    # Observed in eval mode; called submodules have their modes asked about by themselves.
    mode = ("training",) if "training" in reads.behind(name) else ()
    return Row(path, (*keys, *mode), (*values, *(False for _ in mode)), path)


def _of_table(owner: str, table: Mapping[str, Any], names: set[str], reads: Reads) -> Iterator[Row]:
    keys, values, objects = _sorted_out(table, names)
    yield Row(owner, keys, values, table=table, objects=objects)
    yield from _of_namespaces(table, names, reads)
    for name, _ in objects:
        held = _attributes(table[name])
        inner, found, _ = _sorted_out(held, reads.of_object(name, held))
        yield Row(f"{owner}, {name}", inner, found, table=held)


def _of_namespaces(table: Mapping[str, Any], names: Iterable[str], reads: Reads) -> Iterator[Row]:
    """Classes and Python modules that settings are kept in, for the names read right behind theirs."""
    for name in sorted(names):
        held = table.get(name)
        if isinstance(held, type | ModuleType) and is_users(held):
            keys, values, _ = _sorted_out(vars(held), reads.behind(name) & vars(held).keys())
            yield Row(
                f"{'class' if isinstance(held, type) else 'module'} {held.__name__}", keys, values, table=vars(held)
            )


def _attributes(value: Any) -> Mapping[str, Any]:
    return getattr(value, "__dict__", {})


def _sorted_out(
    table: Mapping[str, Any], names: Iterable[str]
) -> tuple[tuple[str, ...], tuple[Any, ...], tuple[tuple[str, type], ...]]:
    """Names of plain values, those values, and the names of other objects with their types."""
    plain: dict[str, Any] = {}
    objects: list[tuple[str, type]] = []
    for name in sorted(names):
        if name not in table:
            continue
        value = table[name]
        if is_plain(value):
            plain[name] = value if isinstance(value, _FIXED) else copy.deepcopy(value)
        elif not _is_others(value):
            objects.append((name, type(value)))
    return tuple(plain), tuple(plain.values()), tuple(objects)


def is_plain(value: Any, depth: int = 2) -> bool:
    """A value that is compared as a whole: a number, a word, a function, or a short container of such."""
    if isinstance(value, _FIXED):
        return True
    if depth and type(value) in (list, tuple, set, frozenset, dict) and len(value) <= _MOST_ENTRIES:
        return all(is_plain(v, depth - 1) for v in (value.values() if isinstance(value, dict) else value))
    return False


def _is_others(value: Any) -> bool:
    """Seen elsewhere, or nothing that a layer's result depends on."""
    return (
        is_tensor_or_module(value)
        or isinstance(value, ModuleType)
        or type(value) in (list, tuple, set, frozenset, dict)
    )
