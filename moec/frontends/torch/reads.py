"""What the Python code behind a call may read besides its arguments: names of attributes, globals, closure cells.

Read off the bytecode of the methods and of the functions they refer to, never off a run: a branch that no probe took
counts too. It is more than the code reads, never less than what it names.
"""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

# Code that refers to more functions than this is a framework's machinery; what it reads is not a layer's attributes.
_MOST_FUNCTIONS = 400
_COMMON = frozenset({*dir(torch.Tensor), *dir(nn.Module)})
_VARIABLES = ("LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF")
_OTHERS = frozenset({"torch", "moec", "numpy", *sys.stdlib_module_names}) - {"__main__"}


@dataclass
class Reads:
    """The names that occur in the code, and its functions, for their globals and closures."""

    names: set[str] = field(default_factory=set)
    functions: dict[CodeType, FunctionType] = field(default_factory=dict)

    def globals(self, *, assigned: bool = False) -> Iterator[tuple[dict[str, Any], set[str]]]:
        """Each table of globals with the names in it that the code reads, or `assigned` too."""
        tables: dict[int, tuple[dict[str, Any], set[str]]] = {}
        for code, function in self.functions.items():
            _, found = tables.setdefault(id(function.__globals__), (function.__globals__, set()))
            names = names_in(code) | _assigned_in(code) if assigned else names_in(code)
            found |= names & function.__globals__.keys()
        yield from tables.values()

    def behind(self, name: str) -> set[str]:
        """Names that are read right behind this one."""
        return {b for code in self.functions for a, b in _pairs_in(code) if a == name}

    def of_object(self, attribute: str, table: Iterable[str]) -> set[str]:
        """Names of `table` that are read of the object in `attribute`.

        Names that tensors and modules have too (dtype, training) count only where they are read right behind it.
        """
        behind = self.behind(attribute)
        return {n for n in self.names.intersection(table) if n in behind or n not in _COMMON}

    def cells(self) -> Iterator[tuple[str, Any]]:
        """Each filled closure cell with its variable's name."""
        for code, function in self.functions.items():
            for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
                try:
                    cell.cell_contents  # noqa: B018 - an empty cell raises
                except ValueError:
                    continue
                yield name, cell


@functools.lru_cache(maxsize=4096)
def names_in(code: CodeType) -> frozenset[str]:
    """Names of attributes and globals that are read, and strings (getattr takes those), nested functions included.

    A name that is only assigned, such as a loss left on the module, is the code's result and none of its settings. Nor
    is a variable of the function's own or of one around it, whatever else has its name.
    """
    loads = [i for i in dis.get_instructions(code) if i.opname.startswith("LOAD_") and isinstance(i.argval, str)]
    found = {i.argval for i in loads if not i.opname.startswith(_VARIABLES)}
    for constant in code.co_consts:
        if isinstance(constant, str):
            found.add(constant)
        elif isinstance(constant, CodeType):
            found |= names_in(constant)
    return frozenset(found)


@functools.lru_cache(maxsize=4096)
def _pairs_in(code: CodeType) -> frozenset[tuple[str, str]]:
    """Names that are read one right behind the other: `self.config.top_k` gives (config, top_k)."""
    found, last = set(), ""
    for i in dis.get_instructions(code):
        name = i.argval if i.opname.startswith("LOAD_") and isinstance(i.argval, str) else ""
        found.add((last, name))
        last = name
    return frozenset(found.union(*(_pairs_in(c) for c in code.co_consts if isinstance(c, CodeType))))


@functools.lru_cache(maxsize=4096)
def _assigned_in(code: CodeType) -> frozenset[str]:
    """Globals that the code assigns."""
    found = {i.argval for i in dis.get_instructions(code) if i.opname == "STORE_GLOBAL"}
    return frozenset(found.union(*(_assigned_in(c) for c in code.co_consts if isinstance(c, CodeType))))


@functools.lru_cache(maxsize=4096)
def assigned_to(code: CodeType) -> frozenset[str]:
    """Names of attributes that the code assigns, of whatever object."""
    return frozenset(i.argval for i in dis.get_instructions(code) if i.opname == "STORE_ATTR")


def classes_of(modules: Iterable[nn.Module]) -> list[type]:
    """The classes of the modules and their bases, without nn.Module and what is below it."""
    below = set(nn.Module.__mro__)
    return [c for c in dict.fromkeys(c for kind in map(type, modules) for c in kind.__mro__) if c not in below]


def reads_of(call: Callable[..., Any], modules: Iterable[nn.Module], entered: Iterable[nn.Module]) -> Reads:
    """What `call` and the forwards of `entered` may read, with the methods of `modules` that they may reach."""
    reads = Reads()
    modules = list({id(m): m for m in modules}.values())
    entered = list(entered)
    classes, forwards = classes_of(modules), classes_of(entered)
    _follow(call, reads)
    for kind in dict.fromkeys(map(type, entered)):
        _follow(getattr(kind, "forward", None), reads)
    known = -1
    while known != len(reads.functions):
        known = len(reads.functions)
        for cls in classes:
            for name in reads.names & vars(cls).keys():
                if name != "forward" or cls in forwards:
                    _follow(vars(cls)[name], reads)
        for module in modules:
            for name in reads.names & module.__dict__.keys():
                _follow(module.__dict__[name], reads)
    return reads


def _follow(value: Any, reads: Reads) -> None:
    """Add a function, whatever it is wrapped in, and the user's functions that it refers to."""
    todo = [value]
    while todo and len(reads.functions) < _MOST_FUNCTIONS:
        current = todo.pop()
        if isinstance(current, FunctionType):
            if current.__code__ not in reads.functions:
                reads.functions[current.__code__] = current
                reads.names |= names_in(current.__code__)
                todo += _mentioned(current)
        else:
            todo += _wrapped(current)


def _wrapped(value: Any) -> list[Any]:
    if isinstance(value, MethodType | staticmethod | classmethod):
        return [value.__func__]
    if isinstance(value, property):
        return [f for f in (value.fget,) if f is not None]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, functools.cached_property):
        return [value.func]
    inner = getattr(value, "__wrapped__", None)
    return [] if inner is None or is_tensor_or_module(value) else [inner]


def _mentioned(function: FunctionType) -> list[Any]:
    inner = getattr(function, "__wrapped__", None)
    found = [] if inner is None else [inner]
    found += [cell.cell_contents for _, cell in Reads(functions={function.__code__: function}).cells()]
    for name in names_in(function.__code__):
        value = function.__globals__.get(name)
        if isinstance(value, FunctionType | functools.partial) and is_users(value):
            found.append(value)
        elif isinstance(value, type) and is_users(value) and not issubclass(value, nn.Module):
            found += vars(value).values()
    return found


def is_users(value: Any) -> bool:
    """A function, class or Python module that is not of torch, of the standard library or of moec."""
    home = str(getattr(value, "__module__", None) or getattr(value, "__name__", ""))
    return home.partition(".")[0] not in _OTHERS


def is_tensor_or_module(value: Any) -> bool:
    """Seen by the log and by the weights' own checks."""
    return isinstance(value, torch.Tensor | nn.Module)
