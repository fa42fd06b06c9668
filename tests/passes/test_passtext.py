"""Passes as text: reading, printing, and what is wrong with text that cannot be read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import MoecError
from moec.ir import Region
from moec.passbase import Pass, PassLog, options_of, type_text
from moec.passes import Canonicalize, FuseExperts, PlaceExperts, PlanCapacity
from moec.passtext import print_pass, read_passes
from moec.pipeline import parse_passes, print_passes


@dataclass(frozen=True)
class Everything:
    """Options of every kind."""

    name: ClassVar[str] = "everything"
    changes_numerics: ClassVar[bool] = False
    whole: int = 0
    real: float = 0.5
    switch: bool = False
    word: str = "x"
    maybe: int | None = None
    numbers: tuple[int, ...] = ()
    names: tuple[str, ...] | None = None
    choice: Literal["a", "b"] = "a"

    def __call__(self, region: Region, log: PassLog) -> Region:
        return region


def test_reads_names_and_options() -> None:
    assert parse_passes("plan-capacity{factor=1.5,tokens=64,scope=sequence},fuse-experts") == (
        PlanCapacity(tokens=64, factor=1.5, scope="sequence"),
        FuseExperts(),
    )


@pytest.mark.parametrize("text", ["", "  ", "\n"])
def test_no_text_is_no_pass(text: str) -> None:
    assert parse_passes(text) == ()


def test_blanks_do_not_matter() -> None:
    assert parse_passes(" place-experts { devices = 2 , owners = [ 0, 1 ] } ,canonicalize{} ") == (
        PlaceExperts(devices=2, owners=(0, 1)),
        Canonicalize(),
    )


def test_objects_and_text_mix() -> None:
    assert parse_passes([Canonicalize(), "fuse-experts,canonicalize"]) == (
        Canonicalize(),
        FuseExperts(),
        Canonicalize(),
    )


def test_a_class_of_ones_own_is_named_by_its_module() -> None:
    (read,) = parse_passes("tests.passes.test_passtext:Everything{whole=3}")
    assert type(read).__name__ == "Everything"
    assert read.whole == 3  # type: ignore[attr-defined]


def test_prints_only_what_differs_from_the_defaults() -> None:
    assert print_pass(PlanCapacity(tokens=64)) == "plan-capacity{tokens=64}"
    assert print_pass(FuseExperts()) == "fuse-experts"
    assert print_pass(FuseExperts(partial=False)) == "fuse-experts{partial=false}"
    assert print_passes([PlaceExperts(devices=2, owners=(0, 1)), Canonicalize()]) == (
        "place-experts{devices=2,owners=[0,1]},canonicalize"
    )


@given(
    st.builds(
        Everything,
        whole=st.integers(),
        real=st.floats(allow_nan=False, allow_infinity=False) | st.integers(-5, 5),
        switch=st.booleans(),
        word=st.text() | st.sampled_from(["true", "none", "1", "1e5", "a b"]),
        maybe=st.none() | st.integers(),
        numbers=st.lists(st.integers()).map(tuple),
        names=st.none() | st.lists(st.text()).map(tuple),
        choice=st.sampled_from(["a", "b"]),
    )
)
def test_text_reads_back_to_the_same_pass(one: Everything) -> None:
    assert read_passes(print_pass(one), {"everything": Everything}) == (one,)


def test_options_have_readable_types() -> None:
    shown = {option.name: option.type_text for option in options_of(Everything)}
    assert shown == {
        "whole": "int",
        "real": "float",
        "switch": "bool",
        "word": "str",
        "maybe": "int | none",
        "numbers": "tuple of int",
        "names": "tuple of str | none",
        "choice": '"a" or "b"',
    }
    assert type_text(list[int]) == "list[int]"


ERRORS = {
    "fuse-expert": """[MOEC301] no pass is named "fuse-expert"
  at column 1 of: fuse-expert
  hint: did you mean "fuse-experts"?""",
    "canonicalize,zzz": """[MOEC301] no pass is named "zzz"
  at column 14 of: canonicalize,zzz
  hint: known: canonicalize, fuse-experts, merge-gate-up, place-experts, plan-capacity, quantize-experts""",
    "no_such_module:Pass": """[MOEC301] "no_such_module:Pass" cannot be imported: No module named 'no_such_module'
  at column 1 of: no_such_module:Pass""",
    "math:pi": """[MOEC309] "math:pi" is not a pass: it is not a class
  at column 1 of: math:pi""",
    "fractions:Fraction": """[MOEC309] Fraction is not a pass: it is not a dataclass
  hint: put @dataclass(frozen=True) above the class; docs/passes.md shows one""",
    "plan-capacity{factr=2}": """[MOEC302] plan-capacity has no option "factr"
  at column 15 of: plan-capacity{factr=2}
  hint: did you mean "factor"?""",
    "canonicalize{x=1}": """[MOEC302] canonicalize has no option "x"
  at column 14 of: canonicalize{x=1}
  hint: canonicalize has no options""",
    "place-experts": """[MOEC302] place-experts: devices must be given
  at column 1 of: place-experts""",
    "plan-capacity{tokens=1,tokens=2}": """[MOEC302] plan-capacity: tokens is given twice
  at column 24 of: plan-capacity{tokens=1,tokens=2}""",
    "plan-capacity{tokens=1.5}": """[MOEC303] plan-capacity: tokens=1.5 is not of type int | none
  at column 22 of: plan-capacity{tokens=1.5}""",
    "plan-capacity{tokens=[1,2]}": """[MOEC303] plan-capacity: tokens=[1,2] is not of type int | none
  at column 22 of: plan-capacity{tokens=[1,2]}""",
    'plan-capacity{tokens="1"}': """[MOEC303] plan-capacity: tokens="1" is not of type int | none
  at column 22 of: plan-capacity{tokens="1"}""",
    "place-experts{devices=2,owners=[0,x]}": """[MOEC303] place-experts: owners=[0,x] is not of type tuple of int | none
  at column 32 of: place-experts{devices=2,owners=[0,x]}""",
    "fuse-experts{partial=1}": """[MOEC303] fuse-experts: partial=1 is not of type bool
  at column 22 of: fuse-experts{partial=1}""",
    "plan-capacity{scope=sequnc}": """[MOEC303] plan-capacity: scope=sequnc is not of type "batch" or "sequence"
  at column 21 of: plan-capacity{scope=sequnc}
  hint: did you mean "sequence"?""",
    "canonicalize,plan-capacity{factor=-1}": """[MOEC304] plan-capacity: factor=-1 must be a number above 0
  at column 14 of: canonicalize,plan-capacity{factor=-1}""",
    "canonicalize,": """[MOEC305] the end stands where the name of a pass is expected
  at column 14 of: canonicalize,""",
    "canonicalize fuse-experts": """[MOEC305] "fuse-experts" stands where a "," or the end is expected
  at column 14 of: canonicalize fuse-experts""",
    "plan-capacity{tokens 3}": """[MOEC305] "3" stands where "=" is expected
  at column 22 of: plan-capacity{tokens 3}""",
    "plan-capacity{tokens=}": """[MOEC305] "}" stands where a value is expected
  at column 22 of: plan-capacity{tokens=}""",
    "plan-capacity{tokens=3": """[MOEC305] the end stands where "," or "}" is expected
  at column 23 of: plan-capacity{tokens=3""",
    "place-experts{owners=[1 2]}": """[MOEC305] "2" stands where "," or "]" is expected
  at column 25 of: place-experts{owners=[1 2]}""",
    "plan-capacity{3=4,=}": """[MOEC302] plan-capacity has no option "3"
  at column 15 of: plan-capacity{3=4,=}
  hint: known: factor, multiple, scope, tokens""",
    "plan-capacity{=4}": """[MOEC305] "=" stands where the name of an option is expected
  at column 15 of: plan-capacity{=4}""",
    "canonicalize;fuse-experts": """[MOEC305] character ';' has no place here
  at column 13 of: canonicalize;fuse-experts""",
    r'plan-capacity{scope="\q"}': r"""[MOEC305] "\q" is not a string: Invalid \escape
  at column 21 of: plan-capacity{scope="\q"}""",
}


@pytest.mark.parametrize("text", ERRORS)
def test_says_what_is_wrong_and_where(text: str) -> None:
    with pytest.raises(MoecError) as error:
        parse_passes(text)
    assert str(error.value) == ERRORS[text]


def test_own_passes_are_passes() -> None:
    assert isinstance(Everything(), Pass)
