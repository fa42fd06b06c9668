"""canonicalize: what goes, what stays because it means something, and that twice is the same as once."""

from __future__ import annotations

import pytest

from moec.ir import Region, parse
from moec.passes import Canonicalize
from moec.pipeline import run
from tests.passes.layers import mixtral_layer, shared_expert_layer, untidy_layer


def lines(text: str, inputs: str = "%x: f32[T, 8]") -> list[str]:
    """The nodes that are left of a region whose last line is the return."""
    after, _ = run(region_of(text, inputs), [Canonicalize()])
    return [str(node) for node in after.nodes]


def region_of(text: str, inputs: str = "%x: f32[T, 8]") -> Region:
    return parse(f"region r({inputs}) {{\n{text}\n}}")


STAYS = {
    "a clamp": '%y = act(%x) {fn="identity", limit=7.0} : f32[T, 8]\nreturn %y',
    "two weights": '%w = weight {ref="w"} : f32[8]\n%y = concat_weights(%w, %w) {axis=0} : f32[16]\nreturn %y',
    "a permutation": (
        '%w = weight {ref="w"} : f32[2, 8]\n%y = select_experts(%w) {experts=[1, 0]} : f32[2, 8]\nreturn %y'
    ),
    "part of the experts": (
        '%w = weight {ref="w"} : f32[2, 8]\n%y = select_experts(%w) {experts=[0]} : f32[1, 8]\nreturn %y'
    ),
    "a product of zeros": "%c = constant {value=0.0} : f32[8]\n%y = mul(%x, %c) : f32[T, 8]\nreturn %y",
    "a sum with one": "%c = constant {value=1.0} : f32[8]\n%y = add(%x, %c) : f32[T, 8]\nreturn %y",
    "a zero that widens": "%c = constant {value=0.0} : f32[2, T, 8]\n%y = add(%x, %c) : f32[2, T, 8]\nreturn %y",
    "a zero that adds an axis": "%c = constant {value=0.0} : f32[1, T, 8]\n%y = add(%x, %c) : f32[1, T, 8]\nreturn %y",
    "another result type": (
        '%w = weight {ref="w"} : f32[4, 8]\n%y = linear(%x, %w) {dtype="bf16"} : bf16[T, 4]\nreturn %y'
    ),
    "two opaque ops that look the same": (
        '%a = opaque(%x) {graph="g"} : f32[T]\n%b = opaque(%x) {graph="g"} : f32[T]\nreturn %a, %b'
    ),
    "an opaque op that nothing uses": '%a = opaque(%x) {graph="g"} : f32[T]\nreturn %x',
    "zero and minus zero": ("%a = constant {value=0.0} : f32[8]\n%b = constant {value=-0.0} : f32[8]\nreturn %a, %b"),
    "constants of two types": ("%a = constant {value=2.0} : f32[8]\n%b = constant {value=2.0} : f32[T]\nreturn %a, %b"),
}


@pytest.mark.parametrize("case", STAYS)
def test_leaves_what_means_something(case: str) -> None:
    region = region_of(STAYS[case])
    after, (log,) = run(region, [Canonicalize()])
    assert after == region
    assert log.done == []


def test_rows_of_no_expert_keep_weights_of_one() -> None:
    """scale_rows makes rows of no slot zero; only rows gathered in this order are so already."""
    text = """%one = constant {value=1.0} : f32[T, 2]
%y = scale_rows(%x, %order, %one) : f32[2T, 8]
return %y"""
    assert len(lines(text, "%x: f32[2T, 8], %order: i32[2T], %w: f32[T]")) == 2
    text = text.replace("%y =", "%r = gather(%x, %order) {k=2} : f32[2T, 8]\n%y =").replace(
        "(%x, %order, %o", "(%r, %order, %o"
    )
    assert len(lines(text, "%x: f32[T, 8], %order: i32[2T]")) == 1
    text = text.replace("gather(%x, %order)", "gather(%x, %other)")
    assert len(lines(text, "%x: f32[T, 8], %order: i32[2T], %other: i32[2T]")) == 3


@pytest.mark.parametrize(
    ("attributes", "left"),
    [
        ("capacity=2T", "{experts=4}"),
        ("capacity=3T", "{experts=4}"),
        ("capacity=2T - 1", "{experts=4, capacity=2T - 1}"),
        ("capacity=16", "{experts=4, capacity=16}"),
        ('capacity=16, scope="sequence", sequence=8', "{experts=4}"),
        ('capacity=15, scope="sequence", sequence=8', '{experts=4, capacity=15, scope="sequence", sequence=8}'),
    ],
)
def test_capacity_with_room_for_every_slot_is_none(attributes: str, left: str) -> None:
    text = f"%order, %offsets = group(%e) {{experts=4, {attributes}}} : i32[2T], i32[5]\nreturn %order"
    assert lines(text, "%e: i32[T, 2]") == [f"%order, %offsets = group(%e) {left} : i32[2T], i32[5]"]


def test_capacity_without_limit_needs_no_weights_to_drop_by() -> None:
    text = '%o, %s = group(%e, weights=%w) {experts=4, capacity=2T, policy="weight"} : i32[2T], i32[5]\nreturn %o'
    assert lines(text, "%e: i32[T, 2], %w: f32[T, 2]") == ["%o, %s = group(%e) {experts=4} : i32[2T], i32[5]"]


def test_sums_are_duplicates_in_either_order() -> None:
    text = "%a = mul(%x, %x) : f32[T, 8]\n%b = add(%x, %a) : f32[T, 8]\n%c = add(%a, %x) : f32[T, 8]\nreturn %b, %c"
    after, _ = run(region_of(text), [Canonicalize()])
    assert [str(value) for value in after.outputs] == ["%b", "%b"]


def test_an_output_may_become_an_input() -> None:
    after, (log,) = run(region_of('%y = act(%x) {fn="identity"} : f32[T, 8]\nreturn %y'), [Canonicalize()])
    assert str(after) == "region r(%x: f32[T, 8]) {\n  return %x\n}"
    assert log.done == ["%y: act changes nothing; %x is used instead"]


def test_weights_stand_before_their_first_use_in_the_order_of_operands() -> None:
    text = """%b = weight {ref="b"} : f32[4]
%q, %s = quantize_weight(%w) : i8[4, 8], f32[4]
%a = act(%x) {fn="relu"} : f32[T, 8]
%y = linear(%a, %q, scale=%s, b=%b) : f32[T, 4]
%z = add(%y, %b) : f32[T, 4]
return %z, %lone"""
    weights = '%lone = weight {ref="lone"} : f32[3]\n%w = weight {ref="w"} : f32[4, 8]\n'
    assert [line.split(" = ")[0] for line in lines(weights + text)] == ["%a", "%w", "%q, %s", "%b", "%y", "%z", "%lone"]


@pytest.mark.parametrize(
    "region", [untidy_layer(), shared_expert_layer(), mixtral_layer("m", e=4, k=2, d=8, f=16)], ids=str
)
def test_twice_is_once(region: Region) -> None:
    once, _ = run(region, [Canonicalize()])
    twice, (log,) = run(once, [Canonicalize()])
    assert twice == once
    assert log.done == []


def test_what_the_front_end_lifts_is_canonical() -> None:
    layer = mixtral_layer("m", e=4, k=2, d=8, f=16, bias=True)
    assert run(layer, [Canonicalize()])[0] == layer
