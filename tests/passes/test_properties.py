"""What holds for passes on any layer: twice is once, logs tell the truth, order where it must not matter."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moec.ir import Region, diff, parse
from moec.pipeline import run
from tests.passes.random_layers import layers, moe_layers, untidy, untidy_layers

ALL = [
    "canonicalize",
    "plan-capacity",
    "plan-capacity{tokens=5,factor=0.5,multiple=1,scope=sequence}",
    "place-experts{devices=3}",
    "quantize-experts",
    "merge-gate-up",
    "fuse-experts",
]


@given(untidy_layers, st.sampled_from(ALL))
def test_twice_is_once(region: Region, text: str) -> None:
    once, _ = run(region, text)
    twice, (log,) = run(once, text)
    assert twice == once
    assert log.done == []


@given(untidy_layers, st.lists(st.sampled_from(["canonicalize", "quantize-experts", "merge-gate-up", "fuse-experts"])))
def test_logs_tell_the_truth(region: Region, texts: list[str]) -> None:
    """Something was done if and only if the region changed, and the text of the result is the result."""
    for text in texts:
        after, (log,) = run(region, text)
        assert bool(log.done) == (after != region)
        assert (log.diff != "") <= bool(log.done)
        assert parse(str(after)) == after
        region = after


@given(layers)
def test_every_ffn_is_fused_or_has_a_reason(region: Region) -> None:
    _, (log,) = run(region, "fuse-experts")
    assert len(log.done) + len(log.skipped) == 1
    assert bool(log.skipped) == ("scale_rows" in str(region))


@given(st.data())
def test_untidiness_does_not_keep_a_layer_from_being_fused(data: st.DataObject) -> None:
    plain = data.draw(layers)
    # Experts without an activation are linear maps and no FFN; canonicalize makes them so.
    assume('act(%h) {fn="identity"}' not in str(plain) and "scale_rows" not in str(plain))
    region = data.draw(untidy(plain))
    _, (_, log) = run(region, "canonicalize,fuse-experts")
    assert len(log.done) == 1, f"{region}\n{log.skipped}"
    assert log.skipped == []


@given(moe_layers(), st.sampled_from(list(permutations(["merge-gate-up", "fuse-experts"]))))
def test_merging_and_fusing_commute(region: Region, order: tuple[str, ...]) -> None:
    expected, _ = run(region, "merge-gate-up,fuse-experts,canonicalize")
    found, _ = run(region, f"{','.join(order)},canonicalize")
    assert diff(expected, found) == ""


@given(
    moe_layers(),
    st.sampled_from(list(permutations(["plan-capacity{tokens=5}", "place-experts{devices=2}", "merge-gate-up"]))),
)
@settings(max_examples=50)
def test_capacity_placement_and_merging_give_the_same_ops_in_any_order(region: Region, order: tuple[str, ...]) -> None:
    expected, _ = run(region, "plan-capacity{tokens=5},place-experts{devices=2},merge-gate-up")
    found, _ = run(region, ",".join(order))
    names = [sorted(node.op.name for node in one.nodes if not node.op.of_weights) for one in (expected, found)]
    assert names[0] == names[1]


@pytest.mark.parametrize("text", ALL)
@given(region=moe_layers())
@settings(max_examples=20)
def test_names_stay_unique_and_inputs_keep_theirs(text: str, region: Region) -> None:
    after, _ = run(region, text)
    names = [value.name for value in after.values]
    assert len(set(names)) == len(names)
    assert after.inputs == region.inputs
