"""Ops from one line of text, for tests of type rules, and a layer that many tests use."""

from __future__ import annotations

from moec.ir import Op, Region, Tensor, Value, parse
from moec.ir.lexer import Cursor
from moec.ir.parse_attribute import read_type
from moec.ir.parse_op import read_op

MOE = """\
region moe(%x: f32[T, 64], %experts: i32[T, 2], %weights: f32[T, 2]) {
  %order, %offsets = group(%experts) {experts=8} : i32[2T], i32[9]
  %rows = gather(%x, %order) {k=2} : f32[2T, 64]
  %w_gate_up = weight {ref="gate_up"} : f32[8, 96, 64]
  %h = grouped_linear(%rows, %offsets, %w_gate_up) : f32[2T, 96]
  %a = glu(%h) {fn="silu", layout="concat"} : f32[2T, 48]
  %w_down = weight {ref="down"} : f32[8, 64, 48]
  %rows_2 = grouped_linear(%a, %offsets, %w_down) : f32[2T, 64]
  %y = combine(%rows_2, %order, %weights) : f32[T, 64]
  return %y
}"""


def moe() -> Region:
    """A top-2 layer of 8 gated experts."""
    return parse(MOE)


def values(text: str) -> dict[str, Value]:
    """Values by name from `x: f32[T, 64], order: i32[2T]`."""
    if not text:
        return {}
    cursor = Cursor(text, code="MOEC120")
    found: dict[str, Value] = {}
    for _ in cursor.separated():
        name = cursor.take().text
        cursor.expect(":", name)
        found[name] = Value(name, read_type(cursor))
    return found


def read(line: str, operands: str) -> tuple[Op, tuple[Tensor, ...] | None]:
    """The op that a line of text states over operands of these types."""
    return read_op(Cursor(line, code="MOEC120"), values(operands))


def result_types(line: str, operands: str) -> str:
    """What the op's type rule says: `i32[2T], i32[9]`."""
    return ", ".join(map(str, read(line, operands)[0].result_types()))
