"""Errors of regions, sizes and programs made in Python: how to cause each, and the whole of what the user reads."""

from __future__ import annotations

from collections.abc import Callable

from moec.ir import (
    Act,
    Builder,
    Dim,
    Glu,
    Graph,
    Node,
    Program,
    Region,
    Tensor,
    Value,
    bind_sizes,
    parse_program,
    verify,
    verify_program,
)
from tests.ir.build import moe

X = Value("x", Tensor.of("f32", "T", 64))
Y = Value("y", Tensor.of("f32", "T", 64))


def verified(
    *nodes: Node, inputs: tuple[Value, ...] = (X,), outputs: tuple[Value, ...] = (Y,), name: str = "r"
) -> Callable[[], object]:
    """Verify a region made by hand."""
    return lambda: verify(Region(name, inputs, nodes, outputs))


def relu(x: Value, y: Value = Y) -> Node:
    return Node((y,), Act(x, fn="relu"))


ERRORS: list[tuple[Callable[[], object], str]] = [
    # regions made by hand
    (
        verified(relu(Value("z", X.type))),
        """\
[MOEC110] act: %z is not defined
  at line 2: %y = act(%z) {fn="relu"} : f32[T, 64]
""",
    ),
    (
        verified(relu(Value("x", Tensor.of("f32", "T", 32)), Value("y", Tensor.of("f32", "T", 32)))),
        """\
[MOEC110] act: %x is used as f32[T, 32] but defined as f32[T, 64]
  at line 2: %y = act(%x) {fn="relu"} : f32[T, 32]
""",
    ),
    (
        verified(relu(Y)),
        """\
[MOEC110] act: %y is not defined
  at line 2: %y = act(%y) {fn="relu"} : f32[T, 64]
""",
    ),
    (
        verified(),
        """\
[MOEC110] return: %y is not defined
  at line 2: return %y
""",
    ),
    (
        verified(relu(X), relu(Y)),
        """\
[MOEC111] %y is defined already, as f32[T, 64]
  at line 3: %y = act(%y) {fn="relu"} : f32[T, 64]
""",
    ),
    (
        verified(inputs=(X, X), outputs=(X,)),
        """\
[MOEC111] %x is defined already, as f32[T, 64]
  at line 1: region r(%x: f32[T, 64], %x: f32[T, 64]) {
""",
    ),
    (
        verified(relu(X, Value("y", Tensor.of("f32", "T", 65)))),
        """\
[MOEC112] act: %y is declared f32[T, 65] but is f32[T, 64]
  at line 2: %y = act(%x) {fn="relu"} : f32[T, 65]
""",
    ),
    (
        verified(Node((Y, Value("z", Y.type)), Act(X, fn="relu"))),
        """\
[MOEC113] act: defines 1 value, found 2 names
  at line 2: %y, %z = act(%x) {fn="relu"} : f32[T, 64], f32[T, 64]
""",
    ),
    (
        verified(relu(X, Value("a b", X.type))),
        """\
[MOEC116] malformed value name 'a b'
  at line 2: %a b = act(%x) {fn="relu"} : f32[T, 64]
  hint: letters, digits, '_' and '.', and '.' not first
""",
    ),
    (
        verified(relu(X), name="two\nlines"),
        """\
[MOEC116] region name 'two\\nlines' must be one line of text
  at line 1: region "two\\nlines"(%x: f32[T, 64]) {
""",
    ),
    (
        verified(relu(X), outputs=()),
        """\
[MOEC117] the region returns nothing
  at line 3: return
  hint: return at least one value
""",
    ),
    (
        verified(Node((Y,), Act(X, fn="relu", limit=float("nan")))),
        """\
[MOEC118] act: limit=nan is not finite
  at line 2: %y = act(%x) {fn="relu", limit=nan} : f32[T, 64]
""",
    ),
    (
        verified(Node((Y,), Glu(X, fn="silu", layout=3))),  # type: ignore[arg-type]
        """\
[MOEC123] glu: layout=3 must be a string
  at line 2: %y = glu(%x) {fn="silu", layout=3} : f32[T, 64]
""",
    ),
    # sizes
    (lambda: Dim.of("T").evaluate({}), "[MOEC108] size T: letter T has no value"),
    (
        lambda: Tensor.of("f32", "T - 4").evaluate({"T": 3}),
        "[MOEC108] shape f32[T - 4] is [-1]: a size is negative",
    ),
    (
        lambda: bind_sizes(moe().inputs, [(5, 64), (4, 2), (5, 2)]),
        "[MOEC109] %experts is i32[T, 2]: T is 5, found 4",
    ),
    # builders and programs
    (
        lambda: Builder("r").add(Act(X, fn="relu")),
        """\
[MOEC110] act: %x is not defined
  at line 2: act(%x) {fn="relu"}
""",
    ),
    (
        lambda: verify_program(Program((moe(), moe()))),
        '[MOEC130] two regions are called "moe"',
    ),
    (
        lambda: parse_program(
            'graph routr {\n}\nregion r(%x: f32[T]) {\n  %y = opaque(%x) {graph="router"} : f32[T]\n  return %y\n}'
        ),
        """\
[MOEC131] opaque: the program has no graph "router"
  at line 2 of region "r": %y = opaque(%x) {graph="router"} : f32[T]
  hint: did you mean "routr"?
""",
    ),
    (
        lambda: Program((moe(),)).region("mo"),
        """\
[MOEC132] the program has no region "mo"
  hint: did you mean "moe"?
""",
    ),
    (
        lambda: verify_program(Program((), (Graph("g", ""), Graph("g", "")))),
        "[MOEC116] graph name 'g' is used twice",
    ),
    (lambda: verify_program(Program((), (Graph("", ""),))), "[MOEC116] graph name '' must be one line of text"),
]
