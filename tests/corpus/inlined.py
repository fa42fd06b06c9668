"""Every block built on `Moe` once more with its methods out of reach, as if all of it were written inside `forward`.

A compiler that replaces one method of a block has less to understand than one that must cut a slice out of `forward`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import MethodType
from typing import Any

from torch import nn

from tests.corpus.blocks import Moe
from tests.corpus.case import CASES, Case

METHODS = ("route", "mix", "expert", "gate", "route_filled", "is_other", "_only")


class Inline:
    """A method that an attribute of the instance cannot replace, and that does not look like a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __get__(self, instance: Any, owner: type) -> Any:
        return self if instance is None else MethodType(self.function, instance)

    def __set__(self, instance: Any, value: Any) -> None:
        raise AttributeError("the code of this block is inlined")


def inlined(case: Case) -> Case | None:
    """The case with inlined methods, or None where there is nothing to inline."""

    def build() -> nn.Module:
        module = case.build()
        module.__class__ = without_methods(type(module))
        return module

    if not isinstance(case.build(), Moe):
        return None
    why = f"as {case.name}, with everything inside forward"
    expect = "either" if case.expect == "compiled" and not case.name.startswith(CORE) else case.expect
    expect = case.inline_expect or expect
    return replace(case, name=f"inline.{case.name}", why=why, build=build, expect=expect)


# What must compile when it is written out inside forward, too: the styles themselves.
CORE = tuple(f"{style}." for style in ("loop_list", "loop_stacked", "sorted", "gathered", "dense_all"))


def without_methods(cls: type[nn.Module]) -> type[nn.Module]:
    parts = {name: Inline(getattr(cls, name)) for name in METHODS if hasattr(cls, name)}
    return type(f"{cls.__name__}Inlined", (cls,), parts)


def add_inlined() -> None:
    """Register the inlined twin of every case there is so far."""
    for known in list(CASES.values()):
        written_out = inlined(known)
        if written_out is not None:
            CASES.add(written_out)
