"""What a pass is: a frozen dataclass that turns a region into a region and says what it did and what it left alone."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Literal, Protocol, Union, runtime_checkable

from moec.errors import MoecError
from moec.ir.core import Region
from moec.options import suggest


@dataclass
class PassLog:
    """One pass on one region: what it did, what it left alone and why. The runner fills in diff and seconds."""

    name: str
    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    diff: str = ""
    """The region before against the region after; empty if nothing changed."""
    seconds: float = 0.0
    numbers: dict[str, int] = field(default_factory=dict)
    """Sums a report needs as numbers, such as bytes of weights before and after."""

    def did(self, text: str) -> None:
        self.done.append(text)

    def skip(self, text: str) -> None:
        """Record a site that was left alone: "%value: reason"."""
        self.skipped.append(text)

    def add(self, name: str, amount: int) -> None:
        """Add to one of the numbers."""
        self.numbers[name] = self.numbers.get(name, 0) + amount


@runtime_checkable
class Pass(Protocol):
    """A frozen dataclass whose fields are its options. It needs no base class and no registration.

    It may also state `before: ClassVar[tuple[str, ...]]`, the passes that must not run ahead of it in one list.
    """

    name: ClassVar[str]
    changes_numerics: ClassVar[bool]

    def __call__(self, region: Region, log: PassLog, /) -> Region: ...


@dataclass(frozen=True)
class Option:
    """One field of a pass, as `moec passes` lists it and as text may set it."""

    name: str
    type: Any
    """The annotation, resolved: int, float, str, bool, None, Literal, tuple[T, ...] and unions of these."""
    default: Any = MISSING

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def type_text(self) -> str:
        return type_text(self.type)


def options_of(kind: type[Any]) -> tuple[Option, ...]:
    """The options of a pass class: its dataclass fields that the constructor takes."""
    if not is_dataclass(kind):
        raise MoecError(
            "MOEC309",
            f"{kind.__name__} is not a pass: it is not a dataclass",
            hint="put @dataclass(frozen=True) above the class; docs/passes.md shows one",
        )
    hints = typing.get_type_hints(kind)
    return tuple(Option(f.name, hints[f.name], _default(f)) for f in fields(kind) if f.init)


def check_options(given: Any) -> None:
    """For a pass's __post_init__: MoecError (MOEC303) names the first option whose value is not of its type."""
    for option in options_of(type(given)):
        value = getattr(given, option.name)
        if not accepts(option.type, value):
            raise wrong_value(given.name, option, repr(value))


def require_option(given: Any, option: str, ok: bool, expected: str) -> None:
    """For a pass's __post_init__: MoecError (MOEC304) unless the option's value is in its range."""
    if not ok:
        raise MoecError("MOEC304", f"{given.name}: {option}={getattr(given, option)!r} must be {expected}")


def wrong_value(name: str, option: Option, shown: str, where: str | None = None) -> MoecError:
    choices = [str(choice) for choice in typing.get_args(option.type)] if _is_literal(option.type) else []
    hint = suggest(shown.strip("'\""), choices) if choices else None
    message = f"{name}: {option.name}={shown} is not of type {option.type_text}"
    return MoecError("MOEC303", message, where=where, hint=hint)


def accepts(kind: Any, value: object) -> bool:
    """True if the value has the annotated type. An int passes for a float, and a bool never for a number."""
    if _is_union(kind):
        return any(accepts(member, value) for member in typing.get_args(kind))
    if _is_literal(kind):
        return value in typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(accepts(typing.get_args(kind)[0], item) for item in value)
    if kind in (None, type(None)):
        return value is None
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind) if isinstance(kind, type) else True


def type_text(kind: Any) -> str:
    """An annotation as a user reads it: "int | None", '"batch" or "sequence"', "tuple of int"."""
    if _is_union(kind):
        return " | ".join(type_text(member) for member in typing.get_args(kind))
    if _is_literal(kind):
        return " or ".join(f'"{choice}"' for choice in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"tuple of {type_text(typing.get_args(kind)[0])}"
    if kind in (None, type(None)):
        return "none"
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)


def before_of(given: Pass | type[Any]) -> tuple[str, ...]:
    """The names of the passes that must not run ahead of this one."""
    return tuple(getattr(given, "before", ()))


def summary(kind: type[Any]) -> str:
    """The first line of a pass's docstring."""
    lines = (kind.__doc__ or "").strip().splitlines()
    return lines[0].strip() if lines else ""


def option_values(given: Any) -> Mapping[str, Any]:
    """The options of a pass that differ from their defaults."""
    values = {option.name: (getattr(given, option.name), option.default) for option in options_of(type(given))}
    return {name: value for name, (value, default) in values.items() if value != default}


def _default(one: Field[Any]) -> Any:
    if one.default_factory is not MISSING:
        return one.default_factory()
    return one.default


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (Union, types.UnionType)


def _is_literal(kind: Any) -> bool:
    return typing.get_origin(kind) is Literal
