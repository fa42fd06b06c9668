"""A call's arguments by name, quickly enough for every forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


class Binder:
    """Names the arguments of one function; variadic ones are named by position."""

    def __init__(self, function: Callable[..., Any]) -> None:
        parameters = inspect.signature(function).parameters.values()
        plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.names = tuple(p.name for p in parameters if p.kind in plain)
        self.defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
        self.required = tuple(
            p.name
            for p in parameters
            if p.default is inspect.Parameter.empty and p.kind in (*plain, inspect.Parameter.KEYWORD_ONLY)
        )

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments by name, defaults included; surplus positional ones are called "*0", "*1", ..."""
        bound = dict(self.defaults)
        bound.update(zip(self.names, args, strict=False))
        for i, value in enumerate(args[len(self.names) :]):
            bound[f"*{i}"] = value
        bound.update(kwargs)
        return bound

    def unbind(self, bound: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments to call the function with."""
        surplus = sorted((n for n in bound if n.startswith("*")), key=lambda n: int(n[1:]))
        positional: list[str] = []
        for name in self.names:
            if name not in bound:
                break
            positional.append(name)
        positional += surplus
        return tuple(bound[n] for n in positional), {n: v for n, v in bound.items() if n not in positional}
