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
