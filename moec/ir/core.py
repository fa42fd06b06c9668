"""The IR: typed values, ops with one type rule each, nodes, regions. Everything is frozen."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self, TypeVar

from moec.errors import MoecError, did_you_mean
from moec.ir.types import Dim, Tensor

Attribute = int | float | str | Dim | tuple[int, ...] | None
VALUE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.]*")


@dataclass(frozen=True)
class Value:
    """A name and a type, printed `%x`. Two values are the same when both are equal."""

    name: str
    type: Tensor

    def __str__(self) -> str:
        return f"%{self.name}"


@dataclass(frozen=True)
class OpField:
    """What a dataclass field of an op is.

    `value` is a required operand, `optional` one that may be None, `values` any number of them, `declared` holds the
    result types that the line of text states, and `attribute` is everything else. Operands that are `keyword` only are
    written `b=%b`.
    """

    name: str
    role: Literal["value", "optional", "values", "declared", "attribute"]
    kind: object
    required: bool
    keyword: bool
    default: Attribute = None


@dataclass(frozen=True)
class Op:
    """The base of all ops. A subclass is a frozen dataclass under `@op(name)`; its docstring is its meaning.

    Fields annotated `Value`, `Value | None` or `tuple[Value, ...]` are operands, `Tensor` or `tuple[Tensor, ...]`
    result types that the text declares, all others attributes.
    """

    name: ClassVar[str]
    fields: ClassVar[tuple[OpField, ...]] = ()
    # The same operands give the same results and nothing else happens; only such ops may be merged or dropped.
    pure: ClassVar[bool] = True
    # The results depend on weights only, so a back end evaluates the op once, when it builds.
    of_weights: ClassVar[bool] = False

    def infer(self) -> tuple[Tensor, ...]:
        """The types of the results. Raises MoecError through `require` where operands or attributes do not fit."""
        raise NotImplementedError(f"{type(self).__name__} has no type rule")

    def result_types(self) -> tuple[Tensor, ...]:
        """`infer`, with the op's name in front of the message and attributes checked first."""
        try:
            for field in self.fields:
                if field.role == "attribute":
                    check_attribute(field, getattr(self, field.name))
            return self.infer()
        except MoecError as error:
            raise MoecError(error.code, f"{self.name}: {error.message}", where=error.where, hint=error.hint) from None

    @property
    def operands(self) -> tuple[Value, ...]:
        """All operands in the order of the fields, without those that are absent."""
        return tuple(value for _, value in self.named_operands)

    @property
    def named_operands(self) -> tuple[tuple[str, Value], ...]:
        """Field name and value of each operand that is present."""
        found: list[tuple[str, Value]] = []
        for field in self.fields:
            value = getattr(self, field.name)
            if field.role == "values":
                found += [(field.name, item) for item in value]
            elif field.role in ("value", "optional") and value is not None:
                found.append((field.name, value))
        return tuple(found)

    @property
    def attributes(self) -> Mapping[str, Attribute]:
        """Attributes by name, defaults included."""
        return {field.name: getattr(self, field.name) for field in self.fields if field.role == "attribute"}

    def map_operands(self, change: Callable[[Value], Value]) -> Self:
        """The same op on other operands."""
        new: dict[str, Value | tuple[Value, ...]] = {}
        for field in self.fields:
            value = getattr(self, field.name)
            if field.role == "values":
                new[field.name] = tuple(change(item) for item in value)
            elif field.role in ("value", "optional") and value is not None:
                new[field.name] = change(value)
        return dataclasses.replace(self, **new) if new else self


O = TypeVar("O", bound=Op)  # noqa: E741
# The op table, the one thing that importing a module adds to.
OPS: dict[str, type[Op]] = {}


def op(name: str) -> Callable[[type[O]], type[O]]:
    """Enter a frozen dataclass into the op table under its name in text."""

    def enter(cls: type[O]) -> type[O]:
        assert name not in OPS, f"two ops are called {name}"
        assert dataclasses.is_dataclass(cls), f"@op({name!r}) stands above @dataclass(frozen=True)"
        cls.name = name
        hints = typing.get_type_hints(cls)
        cls.fields = tuple(_op_field(field, hints[field.name]) for field in dataclasses.fields(cls))
        OPS[name] = cls
        return cls

    return enter


def find_op(name: str) -> type[Op]:
    """The op of this name. Raises MOEC121 with the closest name as a hint."""
    if name not in OPS:
        raise MoecError("MOEC121", f'unknown op "{name}"', hint=did_you_mean(name, OPS))
    return OPS[name]


def require(condition: bool, code: str, message: str, *, hint: str | None = None) -> None:
    """Raise MoecError unless the condition holds; for use in `infer`."""
    if not condition:
        raise MoecError(code, message, hint=hint)


def _op_field(field: dataclasses.Field[object], kind: object) -> OpField:
    required = field.default is dataclasses.MISSING
    keyword = field.kw_only is True
    default = None if required else typing.cast(Attribute, field.default)
    if kind is Value:
        return OpField(field.name, "value", kind, required, keyword)
    if kind == Value | None:
        return OpField(field.name, "optional", kind, required, keyword)
    if kind == tuple[Value, ...]:
        return OpField(field.name, "values", kind, required, keyword)
    if kind in (Tensor, tuple[Tensor, ...]):
        return OpField(field.name, "declared", kind, required, keyword)
    return OpField(field.name, "attribute", kind, required, keyword, default)


def attribute_kind(field: OpField) -> tuple[object, bool]:
    """The kind of an attribute without None, and whether None is allowed."""
    if isinstance(field.kind, types.UnionType):
        return next(part for part in typing.get_args(field.kind) if part is not type(None)), True
    return field.kind, False


KIND_NAMES: Mapping[object, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    Dim: "a size",
    tuple[int, ...]: "a list of whole numbers",
}


def check_attribute(field: OpField, value: object) -> None:
    """Raise MOEC123 when an attribute is not of its field's kind, MOEC118 when text cannot hold it."""
    kind, optional = attribute_kind(field)
    if value is None and optional:
        return
    allowed: tuple[type, ...] = (int, float) if kind is float else (typing.get_origin(kind) or kind,)  # type: ignore[assignment]
    fits = isinstance(value, allowed) and (kind is bool or not isinstance(value, bool))
    if isinstance(value, tuple):
        fits = fits and all(isinstance(item, int) and not isinstance(item, bool) for item in value)
    require(fits, "MOEC123", f"{field.name}={value!r} must be {KIND_NAMES[kind]}")
    if isinstance(value, float):
        require(abs(value) < float("inf"), "MOEC118", f"{field.name}={value} is not finite")


@dataclass(frozen=True)
class Node:
    """One line: the values an op defines."""

    results: tuple[Value, ...]
    op: Op

    def __str__(self) -> str:
        from moec.ir.printer import print_node  # text is written in terms of these classes

        return print_node(self)


@dataclass(frozen=True)
class Region:
    """One layer: inputs, nodes in order of execution, outputs. `verify` says whether it is well-formed."""

    name: str
    inputs: tuple[Value, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[Value, ...]

    def __str__(self) -> str:
        from moec.ir.printer import print_region

        return print_region(self)

    @property
    def weights(self) -> dict[str, Tensor]:
        """Type of each weight by its reference, in order of appearance."""
        from moec.ir.ops_weights import Weight

        return {node.op.ref: node.op.type for node in self.nodes if isinstance(node.op, Weight)}

    @property
    def values(self) -> tuple[Value, ...]:
        """All values in order of definition."""
        return self.inputs + tuple(value for node in self.nodes for value in node.results)

    def producer(self, value: Value) -> Node | None:
        """The node that defines the value; None for an input."""
        return next((node for node in self.nodes if value in node.results), None)

    def users(self, value: Value) -> tuple[Node, ...]:
        """The nodes that take the value as an operand; being an output does not count."""
        return tuple(node for node in self.nodes if value in node.op.operands)
