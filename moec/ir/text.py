"""Reads the text of regions and programs, which `str` prints; errors have a line, and a caret under the culprit."""

from dataclasses import dataclass, field

from moec.errors import MoecError, count
from moec.ir.core import Node, Region, Value
from moec.ir.lexer import Cursor, Token
from moec.ir.parse_attribute import read_string, read_type
from moec.ir.parse_op import read_op, read_use
from moec.ir.program import Graph, Program, verify_program
from moec.ir.types import Tensor
from moec.ir.verify import bound_letters, check_header, check_new_name, check_node, check_outputs, check_weight


def parse(text: str) -> Region:
    """The region that the text states; `parse(str(region)) == region`. Raises MoecError for anything malformed."""
    cursor = Cursor(text, code="MOEC120")
    cursor.skip_newlines()
    region = _read_region(cursor)
    cursor.skip_newlines()
    if cursor.token.kind != "end":
        cursor.fail(f"expected the end of the text after the region, found {cursor.token}")
    return region


def parse_program(text: str) -> Program:
    """The program that the text states; `parse_program(str(program)) == program`. Raises MoecError."""
    cursor = Cursor(text, code="MOEC120")
    graphs: list[Graph] = []
    regions: list[Region] = []
    host: list[str] = []
    cursor.skip_newlines()
    while cursor.token.kind != "end":
        keyword = cursor.token
        if keyword.text == "region":
            regions.append(_read_region(cursor))
        elif keyword.text == "graph":
            cursor.take()
            graphs.append(Graph(_read_title(cursor, "a name of the graph"), _read_verbatim(cursor)))
        elif keyword.text == "host" and not host:
            cursor.take()
            host.append(_read_verbatim(cursor))
        else:
            cursor.fail(f"expected 'region', 'graph' or one 'host', found {keyword}", known=_BLOCKS)
        cursor.skip_newlines()
    program = Program(tuple(regions), tuple(graphs), host[0] if host else "")
    verify_program(program)
    return program


_BLOCKS = ("region", "graph", "host")


@dataclass
class _Scope:
    """What is known at a line of a region."""

    values: dict[str, Value] = field(default_factory=dict)
    letters: frozenset[str] = frozenset()
    weights: dict[str, Tensor] = field(default_factory=dict)


def _read_region(cursor: Cursor) -> Region:
    first = cursor.token
    if first.text != "region":
        cursor.fail(f"expected 'region', found {first}", known=_BLOCKS)
    cursor.take()
    name = _read_title(cursor, "a name of the region")
    scope = _Scope()
    inputs = _read_inputs(cursor, scope)
    with cursor.at_line(first):
        check_header(Region(name, inputs, (), ()))
    cursor.expect_line_end("'{'")
    nodes: list[Node] = []
    while cursor.token.text != "return":
        if cursor.token.kind == "end" or cursor.at("}"):
            cursor.fail(f"expected a line '%name = op(...)' or 'return', found {cursor.token}")
        nodes.append(_read_node(cursor, scope))
        cursor.skip_newlines()
    last = cursor.take()
    outputs = tuple(read_use(cursor, scope.values) for _ in cursor.separated()) if cursor.token.kind == "value" else ()
    with cursor.at_line(last):
        check_outputs(outputs, scope.values)
    cursor.expect_line_end("the values returned")
    cursor.expect("}", "the return of a region")
    return Region(name, inputs, tuple(nodes), outputs)


def _read_inputs(cursor: Cursor, scope: _Scope) -> tuple[Value, ...]:
    inputs: list[Value] = []
    cursor.expect("(", "the name")
    if not cursor.at(")"):
        for _ in cursor.separated():
            token = cursor.expect_kind("value", "an input '%name: type'")
            cursor.expect(":", f"input {token.text}")
            value = Value(token.text[1:], read_type(cursor))
            with cursor.at_token(token):
                check_new_name(value, scope.values)
            scope.letters |= value.type.letters
            inputs.append(value)
    cursor.expect(")", "the inputs")
    cursor.expect("{", "the inputs")
    return tuple(inputs)


def _read_node(cursor: Cursor, scope: _Scope) -> Node:
    first = cursor.token
    names: list[Token] = []
    for _ in cursor.separated():
        token = cursor.expect_kind("value", "a line '%name = op(...)' or 'return'")
        if token.text[1:] in scope.values or token.text in (other.text for other in names):
            cursor.fail(f"{token.text} is defined already", token, code="MOEC111")
        names.append(token)
    cursor.expect("=", "the names of the results")
    op, types = read_op(cursor, scope.values)
    cursor.expect_line_end(f"the op {op.name}")

    with cursor.at_line(first):
        inferred = op.result_types()
        stated = types or inferred
        if not len(names) == len(stated) == len(inferred):
            found = count(len(names), "name") + (f" and {count(len(types), 'type')}" if types else "")
            raise MoecError("MOEC113", f"{op.name}: defines {count(len(inferred), 'value')}, found {found}")
        node = Node(tuple(Value(token.text[1:], type) for token, type in zip(names, stated, strict=True)), op)
        scope.letters |= bound_letters(op)
        check_node(node, scope.values, scope.letters)
        check_weight(op, scope.weights)
    return node


def _read_title(cursor: Cursor, what: str) -> str:
    if cursor.token.kind == "string":
        return read_string(cursor)
    return cursor.expect_kind("name", what).text


def _read_verbatim(cursor: Cursor) -> str:
    """Lines that start with '|', between braces."""
    cursor.expect("{", "the name")
    cursor.expect_line_end("'{'")
    lines: list[str] = []
    while cursor.token.kind == "verbatim":
        lines.append(cursor.take().text[1:].removeprefix(" "))
        cursor.expect_line_end("a line of text")
    cursor.expect("}", "the lines of text, each behind a '|'")
    return "\n".join(lines)
