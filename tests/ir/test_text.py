"""Text of regions: golden text, round trip over all ops, other spellings, and no other exception on any text."""

from __future__ import annotations

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moec.errors import MoecError
from moec.ir import OPS, Region, parse, verify
from tests.ir.build import MOE, moe
from tests.ir.random_regions import regions

SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)


def test_golden_text() -> None:
    assert str(moe()) == MOE


@pytest.mark.parametrize("op", sorted(OPS))
def test_round_trip(op: str) -> None:
    @settings(max_examples=12, suppress_health_check=SLOW)
    @given(regions(op=op))
    def check(region: Region) -> None:
        assert op in {node.op.name for node in region.nodes}
        verify(region)
        text = str(region)
        again = parse(text)
        assert again == region
        assert str(again) == text
        assert hash(again) == hash(region)

    check()


# What a person may write instead.
SPELLINGS = [
    ("region moe(", '\n\nregion "moe"('),
    (" {experts=8} : i32[2T], i32[9]", " {experts=8}"),
    (" : f32[T, 64]\n", "\n"),
    ("gather(%x, %order)", "gather(order=%order, x=%x)"),
    ("f32[2T, 64]", "f32[ T*2 ,(60+4)]"),
    ("weight {", "weight() {"),
    ("  return %y\n", "  # the result\n\n  return %y  # of the layer\n"),
    ("k=2}", "k=2}  "),
    ('{fn="silu", layout="concat"}', '{layout="concat", alpha=1, limit=none, clamp_after=false, fn="\\u0073ilu"}'),
    ("\n", "\r\n"),
    ("}", "}\n\n"),
]


@pytest.mark.parametrize(("old", "new"), SPELLINGS)
def test_other_spellings(old: str, new: str) -> None:
    at = MOE.rindex(old) if old == "}" else MOE.index(old)
    text = MOE.replace(old, new) if old == "\n" else MOE[:at] + new + MOE[at + len(old) :]
    assert text != MOE
    assert parse(text) == moe()


def test_names_that_need_quotes() -> None:
    region = parse('region "layers[0] \\"mlp\\""(%0: f32[T]) {\n  return %0\n}')
    assert region.name == 'layers[0] "mlp"'
    assert parse(str(region)) == region


def test_strings_keep_any_character() -> None:
    text = 'region r(%x: f32[T]) {\n  %y = opaque(%x) {graph="a\\n\\t\\"ü\\u2028#%|"} : f32[T]\n  return %y\n}'
    region = parse(text)
    assert region.nodes[0].op.attributes == {"graph": 'a\n\t"ü\u2028#%|'}
    assert parse(str(region)) == region


SYNTAX = [
    ("region moe", "regio moe", "expected 'region', found 'regio'"),
    ("region moe", "region", "expected a name of the region, found '('"),
    ("(%x:", "%x:", "expected '(' after the name, found '%x'"),
    ("%x: f32", "x: f32", "expected an input '%name: type', found 'x'"),
    ("%x: f32", "%x f32", "expected ':' after input %x, found 'f32'"),
    ("f32[T, 64], %e", "[T, 64], %e", "expected a type like f32[T, 64], found '['"),
    ("f32[T, 64], %e", "f32, %e", "expected '[' after element type f32, found ','"),
    ("64], %e", "64, %e", "expected a size, found '%experts'"),
    ("2]) {", "2] {", "expected ')' after the inputs, found '{'"),
    ("2]) {", "2])", "expected '{' after the inputs, found end of line"),
    ("2]) {\n", "2]) { ", "expected the end of the line after '{', found '%order'"),
    ("%rows = g", "rows = g", "expected a line '%name = op(...)' or 'return', found 'rows'"),
    ("%rows = g", "%rows, = g", "expected a line '%name = op(...)' or 'return', found '='"),
    ("= gather(", "= 2(", "expected the name of an op, found '2'"),
    ("(%x, %order)", "(%x, %order", "expected ')' after the operands, found '{'"),
    ("(%x, %order)", "(%x, )", "expected a value '%name', found ')'"),
    ("(%x, %order)", "(x=%x, x=%x)", "gather: operand x is given twice"),
    ("(%x, %order)", "(%x, order %order)", "expected '=' after operand order, found '%order'"),
    ("{k=2}", "{k=2", "expected '}' after the attributes, found ':'"),
    ("{k=2}", "{k 2}", "expected '=' after attribute k, found '2'"),
    ("{k=2}", "{2}", "expected the name of an attribute, found '2'"),
    ("{k=2}", "{k=2, k=2}", "gather: attribute k is given twice"),
    ("{k=2} : f32[2T, 64]", "{k=2} f32[2T, 64]", "expected the end of the line after the op gather, found 'f32'"),
    ('"concat"', '"con\\cat"', "malformed string: a backslash starts an escape as in JSON"),
    ('"concat"', '"concat', "unexpected character '\"'"),
    ("return %y", "return %y,", "expected a value '%name', found end of line"),
    ("return %y", "return %y %y", "expected the end of the line after the values returned, found '%y'"),
    ("return %y\n}", "return %y\n", "expected '}' after the return of a region, found end of text"),
    ("return %y\n}", "", "expected a line '%name = op(...)' or 'return', found end of text"),
    ("return %y\n}", "return %y\n}\n}", "expected the end of the text after the region, found '}'"),
    ("%rows = g", "$rows = g", "unexpected character '$'"),
]


@pytest.mark.parametrize(("old", "new", "message"), SYNTAX)
def test_syntax_errors_say_what_was_expected(old: str, new: str, message: str) -> None:
    assert MOE.count(old) >= 1
    with pytest.raises(MoecError) as caught:
        parse(MOE.replace(old, new, 1))
    assert caught.value.message == message
    where = (caught.value.where or "").split("\n")
    assert re.match(r"line \d+, column \d+: ", where[0])
    assert re.fullmatch(r" *\^+", where[1])


WRONG_KINDS = [
    ("back=1", "back must be true or false, found '1'"),
    ("back=none", "back must be true or false, found 'none'"),
    ("devices=true", "devices must be a whole number, found 'true'"),
    ('devices="2"', "devices must be a whole number, found '\"2\"'"),
    ("owners=0", "owners must be a list of whole numbers, found '0'"),
    ("owners=[0, x]", "owners must be a list of whole numbers, found '['"),
    ("owners=[0.5]", "owners must be a list of whole numbers, found '['"),
]


@pytest.mark.parametrize(("attribute", "message"), WRONG_KINDS)
def test_attributes_of_the_wrong_kind(attribute: str, message: str) -> None:
    text = f"region r(%x: f32[T, 2], %o: i32[2]) {{\n  %y, %p = exchange(%x, %o) {{{attribute}}}\n  return %y\n}}"
    with pytest.raises(MoecError) as caught:
        parse(text)
    assert (caught.value.code, caught.value.message) == ("MOEC123", f"exchange: {message}")


def test_empty_parts() -> None:
    region = parse("region r() {\n  %y = constant() {value=-1} : f32[]\n  return %y\n}")
    assert str(region) == "region r() {\n  %y = constant {value=-1.0} : f32[]\n  return %y\n}"
    with pytest.raises(MoecError) as caught:
        parse("region r() {\n  %y = constant {} : f32[]\n  return %y\n}")
    assert caught.value.message == "constant: missing attribute value"


PIECES = re.findall(r"%?\w+|\s+|[^\w\s]", MOE)
EXTRA = [
    *PIECES,
    *OPS,
    *(
        "%zz",
        "2.5",
        "-",
        "1e999",
        "9" * 30,
        '"',
        "\\",
        "|",
        "#",
        "none",
        "true",
        "[",
        "]",
        "(",
        ")",
        "{",
        "}",
        ",",
        "=",
        ":",
    ),
    *("/", "*", "floordiv", "min(", "T", "É", "\x00", "\u2028", "graph", "host", "->", "."),
]


@settings(max_examples=400, suppress_health_check=SLOW)
@given(st.data())
def test_mutated_text_is_a_region_or_an_error(data: st.DataObject) -> None:
    pieces = list(PIECES)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(pieces) - 1))
        kind = data.draw(st.sampled_from(["drop", "insert", "swap", "replace", "cut"]))
        if kind == "drop" and len(pieces) > 1:
            del pieces[at]
        elif kind == "insert":
            pieces.insert(at, data.draw(st.sampled_from(EXTRA)))
        elif kind == "swap":
            other = data.draw(st.integers(0, len(pieces) - 1))
            pieces[at], pieces[other] = pieces[other], pieces[at]
        elif kind == "replace":
            pieces[at] = data.draw(st.one_of(st.sampled_from(EXTRA), st.text(max_size=4)))
        else:
            pieces = pieces[: at + 1]
    text = "".join(pieces)
    try:
        region = parse(text)
    except MoecError as error:
        assert error.where, text  # noqa: PT017  # either outcome is right; an error must have a place
        return
    assert parse(str(region)) == region


@settings(max_examples=200, suppress_health_check=SLOW)
@given(st.text(max_size=40))
def test_any_text_is_a_region_or_an_error(text: str) -> None:
    try:
        parse(text)
    except MoecError as error:
        assert error.code == "MOEC120"  # noqa: PT017  # either outcome is right
