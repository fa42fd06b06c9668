"""Reads the values of attributes and types."""

import json
from collections.abc import Callable

from moec.ir.core import KIND_NAMES, Attribute, OpField, attribute_kind
from moec.ir.dim_text import read_dim, whole_number
from moec.ir.lexer import Cursor
from moec.ir.types import DTYPES, Dim, Tensor


def read_type(cursor: Cursor) -> Tensor:
    """`f32[T, 64]`. Raises MOEC101 for an unknown element type."""
    token = cursor.expect_kind("name", "a type like f32[T, 64]")
    if token.text not in DTYPES:
        cursor.fail(f'unknown element type "{token.text}"', token, code="MOEC101", known=DTYPES)
    cursor.expect("[", f"element type {token.text}")
    shape: tuple[Dim, ...] = ()
    if not cursor.at("]"):
        shape = tuple(read_dim(cursor) for _ in cursor.separated())
    cursor.expect("]", "the sizes")
    return Tensor(token.text, shape)


def read_attribute(cursor: Cursor, op_name: str, item: OpField) -> Attribute:
    """The value of one attribute. Raises MOEC123 when it is not of the attribute's kind."""
    kind, optional = attribute_kind(item)
    start = cursor.token
    if optional and start.text == "none":
        cursor.take()
        return None
    if kind is Dim and (start.kind in ("name", "number") or cursor.at("(", "-")):
        return read_dim(cursor)
    read = _READERS.get(kind)
    value = read(cursor) if read else None
    if value is None:
        message = f"{op_name}: {item.name} must be {KIND_NAMES[kind]}, found {start}"
        cursor.fail(message, start, code="MOEC123")
    return value


def _read_int(cursor: Cursor) -> int | None:
    sign = -1 if cursor.accept("-") else 1
    token = cursor.token
    if token.kind != "number" or not token.text.isdigit():
        return None
    return sign * whole_number(cursor, cursor.take())


def _read_float(cursor: Cursor) -> float | None:
    sign = -1.0 if cursor.accept("-") else 1.0
    return sign * float(cursor.take().text) if cursor.token.kind == "number" else None


def _read_bool(cursor: Cursor) -> bool | None:
    return cursor.take().text == "true" if cursor.token.text in ("true", "false") else None


def _read_string(cursor: Cursor) -> str | None:
    return read_string(cursor) if cursor.token.kind == "string" else None


def read_string(cursor: Cursor) -> str:
    """The text of a string token."""
    token = cursor.take()
    try:
        text = json.loads(token.text)
    except ValueError:
        cursor.fail("malformed string: a backslash starts an escape as in JSON", token)
    assert isinstance(text, str)
    return text


def _read_ints(cursor: Cursor) -> tuple[int, ...] | None:
    if not cursor.accept("["):
        return None
    if cursor.accept("]"):
        return ()
    items = [_read_int(cursor) for _ in cursor.separated()]
    numbers = tuple(item for item in items if item is not None)
    if len(numbers) < len(items):
        return None
    cursor.expect("]", "the list")
    return numbers


_READERS: dict[object, Callable[[Cursor], Attribute]] = {
    int: _read_int,
    float: _read_float,
    bool: _read_bool,
    str: _read_string,
    tuple[int, ...]: _read_ints,
}
