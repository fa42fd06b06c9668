"""Errors that text causes: how to cause each, and the whole of what the user reads."""

from __future__ import annotations

from collections.abc import Callable

from moec.ir import parse
from tests.ir.build import MOE


def changed(old: str, new: str) -> Callable[[], object]:
    """Read the MoE layer with one part of its text changed."""
    assert old in MOE
    return lambda: parse(MOE.replace(old, new, 1))


ERRORS: list[tuple[Callable[[], object], str]] = [
    (
        changed("f32[2T, 64]", "f33[2T, 64]"),
        """\
[MOEC101] unknown element type "f33"
  at line 3, column 38: %rows = gather(%x, %order) {k=2} : f33[2T, 64]
                                                           ^^^
  hint: did you mean "f32"?
""",
    ),
    (
        changed("{k=2}", "{k=0}"),
        """\
[MOEC102] gather: k=0 must be at least 1
  at line 3: %rows = gather(%x, %order) {k=0} : f32[2T, 64]
""",
    ),
    (
        changed("gather(%x", "gather(%order"),
        """\
[MOEC103] gather: x must have 2 sizes, found i32[2T]
  at line 3: %rows = gather(%order, %order) {k=2} : f32[2T, 64]
""",
    ),
    (
        changed("group(%experts)", "group(%x)"),
        """\
[MOEC104] group: ids must hold i32 or i64, found f32[T, 64]
  at line 2: %order, %offsets = group(%x) {experts=8} : i32[2T], i32[9]
""",
    ),
    (
        changed("{experts=8} : i32[2T], i32[9]", "{experts=7} : i32[2T], i32[8]"),
        """\
[MOEC105] grouped_linear: offsets must be [9] for w f32[8, 96, 64], found i32[8]
  at line 5: %h = grouped_linear(%rows, %offsets, %w_gate_up) : f32[2T, 96]
""",
    ),
    (
        changed("{experts=8}", '{experts=8, priority="choice"}'),
        """\
[MOEC106] group: policy, priority and scope say which slots to drop: they need capacity
  at line 2: %order, %offsets = group(%experts) {experts=8, priority="choice"} : i32[2T], i32[9]
""",
    ),
    (
        changed("i32[2T], i32[9]", "i32[2T], i32[9 + ]"),
        """\
[MOEC107] expected a size, found ']'
  at line 2, column 69: %order, %offsets = group(%experts) {experts=8} : i32[2T], i32[9 + ]
                                                                                          ^
""",
    ),
    (
        changed("{experts=8}", "{experts=8, capacity=ceildiv(T, 2 - 2)}"),
        """\
[MOEC107] size divided by 0
  at line 2, column 59: %order, %offsets = group(%experts) {experts=8, capacity=ceildiv(T, 2 - 2)} : i32[2T], i32[9]
                                                                                ^^^^^^^
  hint: divide by a positive size
""",
    ),
    (
        changed("(%rows, %offsets,", "(%rows, %offset,"),
        """\
[MOEC110] %offset is not defined
  at line 5, column 30: %h = grouped_linear(%rows, %offset, %w_gate_up) : f32[2T, 96]
                                                   ^^^^^^^
  hint: did you mean "%offsets"?
""",
    ),
    (
        changed("return %y", "return %z"),
        """\
[MOEC110] %z is not defined
  at line 10, column 10: return %z
                                ^^
""",
    ),
    (
        changed("%a = glu", "%h = glu"),
        """\
[MOEC111] %h is defined already
  at line 6, column 3: %h = glu(%h) {fn="silu", layout="concat"} : f32[2T, 48]
                       ^^
""",
    ),
    (
        changed("%order, %offsets =", "%order, %order ="),
        """\
[MOEC111] %order is defined already
  at line 2, column 11: %order, %order = group(%experts) {experts=8} : i32[2T], i32[9]
                                ^^^^^^
""",
    ),
    (
        changed("%experts: i32", "%x: i32"),
        """\
[MOEC111] %x is defined already, as f32[T, 64]
  at line 1, column 28: region moe(%x: f32[T, 64], %x: i32[T, 2], %weights: f32[T, 2]) {
                                                   ^^
""",
    ),
    (
        changed(" : f32[2T, 96]", " : f32[2T, 95]"),
        """\
[MOEC112] grouped_linear: %h is declared f32[2T, 95] but is f32[2T, 96]
  at line 5: %h = grouped_linear(%rows, %offsets, %w_gate_up) : f32[2T, 95]
""",
    ),
    (
        changed(
            "%order, %offsets = group(%experts) {experts=8} : i32[2T], i32[9]", "%order = group(%experts) {experts=8}"
        ),
        """\
[MOEC113] group: defines 2 values, found 1 name
  at line 2: %order = group(%experts) {experts=8}
""",
    ),
    (
        changed(" : i32[2T], i32[9]", " : i32[2T]"),
        """\
[MOEC113] group: defines 2 values, found 2 names and 1 type
  at line 2: %order, %offsets = group(%experts) {experts=8} : i32[2T]
""",
    ),
    (
        changed(" : f32[8, 96, 64]", " : f32[8, 96, 64], f32[8]"),
        """\
[MOEC113] weight: defines 1 value, found 2 types
  at line 4, column 16: %w_gate_up = weight {ref="gate_up"} : f32[8, 96, 64], f32[8]
                                     ^^^^^^
""",
    ),
    (
        changed("{experts=8}", "{experts=8, capacity=ceildiv(S, 4)}"),
        """\
[MOEC114] group: no input binds the letter S of size ceildiv(S, 4)
  at line 2: %order, %offsets = group(%experts) {experts=8, capacity=ceildiv(S, 4)} : i32[2T], i32[9]
  hint: a letter must occur in the type of an input or a weight
""",
    ),
    (
        changed('"down"', '"gate_up"'),
        """\
[MOEC115] weight: "gate_up" is f32[8, 64, 48] here and f32[8, 96, 64] before
  at line 7: %w_down = weight {ref="gate_up"} : f32[8, 64, 48]
""",
    ),
    (
        changed("region moe", 'region ""'),
        """\
[MOEC116] region name '' must be one line of text
  at line 1: region ""(%x: f32[T, 64], %experts: i32[T, 2], %weights: f32[T, 2]) {
""",
    ),
    (
        changed("return %y", "return"),
        """\
[MOEC117] the region returns nothing
  at line 10: return
  hint: return at least one value
""",
    ),
    (
        changed('layout="concat"', 'layout="concat", limit=1e999'),
        """\
[MOEC118] glu: limit=inf is not finite
  at line 6: %a = glu(%h) {fn="silu", layout="concat", limit=1e999} : f32[2T, 48]
""",
    ),
    (
        changed("%rows = gather", "%rows gather"),
        """\
[MOEC120] expected '=' after the names of the results, found 'gather'
  at line 3, column 9: %rows gather(%x, %order) {k=2} : f32[2T, 64]
                             ^^^^^^
""",
    ),
    (
        changed("= grouped_linear", "= grouped_liner"),
        """\
[MOEC121] unknown op "grouped_liner"
  at line 5, column 8: %h = grouped_liner(%rows, %offsets, %w_gate_up) : f32[2T, 96]
                            ^^^^^^^^^^^^^
  hint: did you mean "grouped_linear"?
""",
    ),
    (
        changed("{experts=8}", "{expert=8}"),
        """\
[MOEC122] group has no attribute "expert"
  at line 2, column 39: %order, %offsets = group(%experts) {expert=8} : i32[2T], i32[9]
                                                            ^^^^^^
  hint: did you mean "experts"?
""",
    ),
    (
        changed("%w_gate_up) :", "%w_gate_up, bias=%x) :"),
        """\
[MOEC122] grouped_linear has no operand "bias"
  at line 5, column 52: %h = grouped_linear(%rows, %offsets, %w_gate_up, bias=%x) : f32[2T, 96]
                                                                         ^^^^
""",
    ),
    (
        changed("%w_gate_up) :", "%w_gate_up, %x) :"),
        """\
[MOEC122] grouped_linear takes 3 operands (rows, offsets, w), found one more: %x
  at line 5, column 52: %h = grouped_linear(%rows, %offsets, %w_gate_up, %x) : f32[2T, 96]
                                                                         ^^
  hint: other operands are written b=%x or scale=%x or x_scale=%x
""",
    ),
    (
        changed("weight {", "weight(%x) {"),
        """\
[MOEC122] weight takes no operands, found one more: %x
  at line 4, column 23: %w_gate_up = weight(%x) {ref="gate_up"} : f32[8, 96, 64]
                                            ^^
""",
    ),
    (
        changed("{k=2}", "{k=2.5}"),
        """\
[MOEC123] gather: k must be a whole number, found '2.5'
  at line 3, column 33: %rows = gather(%x, %order) {k=2.5} : f32[2T, 64]
                                                      ^^^
""",
    ),
    (
        changed(" {k=2}", ""),
        """\
[MOEC124] gather: missing attribute k
  at line 3, column 11: %rows = gather(%x, %order) : f32[2T, 64]
                                ^^^^^^
""",
    ),
    (
        changed("gather(%x, %order)", "gather(order=%order)"),
        """\
[MOEC124] gather: missing operand x
  at line 3, column 11: %rows = gather(order=%order) {k=2} : f32[2T, 64]
                                ^^^^^^
""",
    ),
    (
        changed(" : f32[8, 96, 64]", ""),
        """\
[MOEC125] weight: the line must state the result's type
  at line 4, column 16: %w_gate_up = weight {ref="gate_up"}
                                     ^^^^^^
  hint: end the line with " : f32[T, 64]" or what the result of weight is
""",
    ),
]
