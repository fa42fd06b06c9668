"""plan-capacity: the number it plans, what it leaves alone and why, and its options."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import MoecError
from moec.ir import Group, Region
from moec.passes import PlanCapacity
from moec.pipeline import run
from tests.passes.layers import mixtral_layer
from tests.passes.variant import skipped, variant

LAYER = mixtral_layer("moe", e=4, k=2, d=8, f=16)


def group_of(region: Region) -> Group:
    (group,) = (node.op for node in region.nodes if isinstance(node.op, Group))
    return group


@given(
    st.integers(1, 5000),
    st.sampled_from([1.0, 1.1, 1.25, 2.0, 0.3, 1e-3, 7.0]),
    st.sampled_from([(1, 1), (4, 2), (7, 3), (64, 8)]),
    st.sampled_from([1, 8, 16, 100]),
)
def test_capacity_is_the_formula(tokens: int, factor: float, experts: tuple[int, int], multiple: int) -> None:
    e, k = experts
    least = math.ceil(Fraction(tokens * k, e) * Fraction(str(factor)))
    expected = math.ceil(Fraction(least, multiple)) * multiple
    layer = mixtral_layer("moe", e=e, k=k, d=8, f=16)
    for planned in (
        PlanCapacity(tokens=tokens, factor=factor, multiple=multiple),
        PlanCapacity(factor=factor, multiple=multiple),
    ):
        capacity = planned.capacity(group_of(layer))
        assert capacity.evaluate({"T": tokens}) == expected
        assert (capacity.constant is None) == (planned.tokens is None)


def test_a_factor_counts_as_it_is_written() -> None:
    """100 * 1.1 slots are 110; as a binary fraction 1.1 is a little more, and the ceiling would give 111."""
    layer = mixtral_layer("moe", e=1, k=1, d=8, f=16)
    assert PlanCapacity(tokens=100, factor=1.1, multiple=1).capacity(group_of(layer)).constant == 110


def test_states_scope_and_sequence() -> None:
    batch = group_of(run(LAYER, [PlanCapacity(tokens=64)])[0])
    assert (batch.scope, batch.sequence, batch.policy, batch.priority) == ("batch", None, "arrival", "token")
    sequence = group_of(run(LAYER, [PlanCapacity(tokens=64, scope="sequence")])[0])
    assert (sequence.scope, str(sequence.sequence), str(sequence.capacity)) == ("sequence", "64", "48")


SKIPPED: dict[str, tuple[Region, str]] = {
    "capacity already": (run(LAYER, "plan-capacity{tokens=64}")[0], "%order: it has a capacity already, 48"),
    "fused": (
        run(LAYER, "fuse-experts")[0],
        "%y: fused experts drop nothing; plan-capacity comes before fuse-experts",
    ),
    "expert choice": (
        variant(
            LAYER,
            ("%experts: i32[T, 2], %weights: f32[T, 2]", "%experts: i32[4, C], %weights: f32[4, C]"),
            ("{experts=4} : i32[2T]", '{experts=4, by="expert"} : i32[4C]'),
            ("{k=2}", "{k=1}"),
            ("f32[2T,", "f32[4C,"),
            ("combine(%out, %order, %weights)", 'combine(%out, %order, %weights) {by="expert", tokens=T}'),
        ),
        "%order: experts choose tokens and take as many as they have places",
    ),
}


@pytest.mark.parametrize("case", SKIPPED)
def test_says_why(case: str) -> None:
    region, reason = SKIPPED[case]
    assert skipped(region, "plan-capacity") == [reason]
    assert run(region, "plan-capacity")[0] == region


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "[MOEC304] plan-capacity: tokens=0 must be at least 1"),
        ({"factor": 0.0}, "[MOEC304] plan-capacity: factor=0.0 must be a number above 0"),
        ({"factor": math.inf}, "[MOEC304] plan-capacity: factor=inf must be a number above 0"),
        ({"factor": math.nan}, "[MOEC304] plan-capacity: factor=nan must be a number above 0"),
        ({"multiple": 0}, "[MOEC304] plan-capacity: multiple=0 must be at least 1"),
        (
            {"scope": "sequence"},
            "[MOEC304] plan-capacity: scope='sequence' must be given together with tokens, the length of a sequence",
        ),
        ({"tokens": "64"}, "[MOEC303] plan-capacity: tokens='64' is not of type int | none"),
        ({"multiple": True}, "[MOEC303] plan-capacity: multiple=True is not of type int"),
        (
            {"scope": "sequences"},
            """[MOEC303] plan-capacity: scope='sequences' is not of type "batch" or "sequence"
  hint: did you mean "sequence"?""",
        ),
    ],
)
def test_checks_its_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(MoecError) as error:
        PlanCapacity(**options)  # type: ignore[arg-type]
    assert str(error.value) == message
