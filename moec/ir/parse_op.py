"""Reads one op: its name, operands, attributes and declared types."""

from collections.abc import Mapping

from moec.errors import MoecError, count
from moec.ir.core import OPS, Op, OpField, Value
from moec.ir.lexer import Cursor, Token
from moec.ir.parse_attribute import read_attribute, read_type
from moec.ir.types import Tensor


def read_op(cursor: Cursor, values: Mapping[str, Value]) -> tuple[Op, tuple[Tensor, ...] | None]:
    """`gather(%x, %order) {k=2} : f32[2T, 64]`: the op, and the result types if the text states them."""
    token = cursor.expect_kind("name", "the name of an op")
    if token.text not in OPS:
        cursor.fail(f'unknown op "{token.text}"', token, code="MOEC121", known=OPS)
    cls = OPS[token.text]
    given = _read_operands(cursor, cls, values) | _read_attributes(cursor, cls)
    types = tuple(read_type(cursor) for _ in cursor.separated()) if cursor.accept(":") else None
    return _make_op(cursor, token, cls, given, types), types


def _make_op(
    cursor: Cursor, token: Token, cls: type[Op], given: dict[str, object], types: tuple[Tensor, ...] | None
) -> Op:
    for item in cls.fields:
        if item.role == "declared":
            if types is None:
                hint = f'end the line with " : f32[T, 64]" or what the result of {cls.name} is'
                raise MoecError(
                    "MOEC125",
                    f"{cls.name}: the line must state the result's type",
                    where=cursor.where(token),
                    hint=hint,
                )
            if item.kind is Tensor and len(types) != 1:
                cursor.fail(f"{cls.name}: defines 1 value, found {len(types)} types", token, code="MOEC113")
            given[item.name] = types[0] if item.kind is Tensor else types
        elif item.required and item.name not in given:
            what = "attribute" if item.role == "attribute" else "operand"
            cursor.fail(f"{cls.name}: missing {what} {item.name}", token, code="MOEC124")
    return cls(**given)


def _read_operands(cursor: Cursor, cls: type[Op], values: Mapping[str, Value]) -> dict[str, object]:
    given: dict[str, object] = {}
    positional = [item for item in cls.fields if item.role in ("value", "optional") and not item.keyword]
    named = {item.name: item for item in cls.fields if item.role in ("value", "optional")}
    rest = next((item for item in cls.fields if item.role == "values"), None)
    many: list[Value] = []
    if cursor.accept("(") and not cursor.accept(")"):
        for _ in cursor.separated():
            token = cursor.token
            if token.kind == "name":
                cursor.take()
                if token.text not in named:
                    cursor.fail(f'{cls.name} has no operand "{token.text}"', token, code="MOEC122", known=named)
                if token.text in given:
                    cursor.fail(f"{cls.name}: operand {token.text} is given twice", token)
                cursor.expect("=", f"operand {token.text}")
                given[token.text] = read_use(cursor, values)
                continue
            value = read_use(cursor, values)
            name = next((item.name for item in positional if item.name not in given), None)
            if name is not None:
                given[name] = value
            elif rest is not None:
                many.append(value)
            else:
                _fail_too_many(cursor, cls, token, named)
        cursor.expect(")", "the operands")
    if rest is not None:
        given[rest.name] = tuple(many)
    return given


def _fail_too_many(cursor: Cursor, cls: type[Op], token: Token, named: dict[str, OpField]) -> None:
    takes = [item.name for item in named.values() if not item.keyword]
    keyword = [f"{item.name}={token.text}" for item in named.values() if item.keyword]
    number = count(len(takes), "operand") if takes else "no operands"
    listed = f" ({', '.join(takes)})" if takes else ""
    hint = f"other operands are written {' or '.join(keyword)}" if keyword else None
    message = f"{cls.name} takes {number}{listed}, found one more: {token.text}"
    raise MoecError("MOEC122", message, where=cursor.where(token), hint=hint)


def read_use(cursor: Cursor, values: Mapping[str, Value]) -> Value:
    """A value that is defined. Raises MOEC110 for one that is not."""
    token = cursor.expect_kind("value", "a value '%name'")
    value = values.get(token.text[1:])
    if value is None:
        known = [f"%{name}" for name in values]
        cursor.fail(f"{token.text} is not defined", token, code="MOEC110", known=known)
    return value


def _read_attributes(cursor: Cursor, cls: type[Op]) -> dict[str, object]:
    given: dict[str, object] = {}
    known = {item.name: item for item in cls.fields if item.role == "attribute"}
    if not cursor.accept("{") or cursor.accept("}"):
        return given
    for _ in cursor.separated():
        token = cursor.expect_kind("name", "the name of an attribute")
        if token.text not in known:
            cursor.fail(f'{cls.name} has no attribute "{token.text}"', token, code="MOEC122", known=known)
        if token.text in given:
            cursor.fail(f"{cls.name}: attribute {token.text} is given twice", token)
        cursor.expect("=", f"attribute {token.text}")
        given[token.text] = read_attribute(cursor, cls.name, known[token.text])
    cursor.expect("}", "the attributes")
    return given
