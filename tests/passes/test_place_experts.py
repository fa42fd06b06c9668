"""place-experts: where rows travel, what is left alone and why, and its options."""

from __future__ import annotations

import pytest

from moec.errors import MoecError
from moec.ir import Exchange, Region, SelectExperts, parse
from moec.passes import PlaceExperts
from moec.pipeline import run
from tests.passes.layers import mixtral_layer
from tests.passes.variant import variant

LAYER = mixtral_layer("moe", e=4, k=2, d=8, f=16)
PAIR = mixtral_layer("moe", e=4, k=2, d=8, f=16, layout="pair", bias=True)


def exchanges(region: Region) -> list[Exchange]:
    return [node.op for node in region.nodes if isinstance(node.op, Exchange)]


def test_rows_go_once_there_and_once_back() -> None:
    """Gate and up read the same rows, and the activation runs where its operands are."""
    after, (log,) = run(PAIR, [PlaceExperts(devices=2)])
    assert [op.back for op in exchanges(after)] == [False, True]
    assert log.done == ["%offsets: 4 experts on 2 devices, 2 + 2"]
    assert log.skipped == []


def test_round_robin_and_given_owners() -> None:
    assert exchanges(run(LAYER, [PlaceExperts(devices=3)])[0])[0].owners == (0, 1, 2, 0)
    after, (log,) = run(LAYER, [PlaceExperts(devices=3, owners=(2, 0, 0, 2))])
    assert exchanges(after)[0].owners == (2, 0, 0, 2)
    assert log.done == ["%offsets: 4 experts on 3 devices, 2 + 0 + 2"]


def test_a_weight_used_twice_is_selected_once() -> None:
    tied = variant(PAIR, ("%rows, %offsets, %w_up,", "%rows, %offsets, %w_gate,"))
    after, _ = run(tied, [PlaceExperts(devices=2)])
    assert sum(isinstance(node.op, SelectExperts) for node in after.nodes) == 2 * 3 - 1


def test_weights_on_the_input_are_applied_before_rows_leave() -> None:
    after, _ = run(mixtral_layer("moe", e=4, k=2, d=8, f=16, on_input=True), [PlaceExperts(devices=2)])
    names = [node.op.name for node in after.nodes if not node.op.of_weights]
    assert names[:4] == ["group", "gather", "scale_rows", "exchange"]


def test_norms_products_and_vectors_between_the_experts_stay_on_the_devices() -> None:
    region = parse(
        """region moe(%x: f32[T, 8], %experts: i32[T, 2], %weights: f32[T, 2], %seen: f32[2T, 8]) {
  %order, %offsets = group(%experts) {experts=4} : i32[2T], i32[5]
  %rows = gather(%x, %order) {k=2} : f32[2T, 8]
  %w_norm = weight {ref="norm"} : f32[4, 8]
  %n = norm(%rows, offsets=%offsets, w=%w_norm) {kind="rms", eps=1e-06} : f32[2T, 8]
  %w_up = weight {ref="up"} : f32[4, 8, 8]
  %w_up_q, %w_up_scale = quantize_weight(%w_up) : i8[4, 8, 8], f32[4, 8]
  %q, %s = quantize_rows(%n) : i8[2T, 8], f32[2T, 1]
  %h = grouped_linear(%q, %offsets, %w_up_q, scale=%w_up_scale, x_scale=%s) {dtype="f32"} : f32[2T, 8]
  %w_bias = weight {ref="bias"} : f32[8]
  %b = add(%h, %w_bias) : f32[2T, 8]
  %r = add(%b, %rows) : f32[2T, 8]
  %w_down = weight {ref="down"} : f32[4, 8, 8]
  %out = grouped_linear(%r, %offsets, %w_down) : f32[2T, 8]
  %y = combine(%out, %order, %weights) : f32[T, 8]
  return %y
}"""
    )
    after, (log,) = run(region, [PlaceExperts(devices=2)])
    assert log.skipped == []
    assert [op.back for op in exchanges(after)] == [False, True]
    homes = {str(node.op.operands[0]) for node in after.nodes if isinstance(node.op, Exchange)}
    assert homes == {"%rows", "%out"}


def test_rows_that_others_read_come_back_for_them() -> None:
    region = variant(PAIR, ("  return %y", '  %z = opaque(%out, %rows) {graph="g"} : f32[1]\n  return %y, %z, %g'))
    after, (log,) = run(region, [PlaceExperts(devices=2)])
    assert log.skipped == []
    back = [str(op.rows) for op in exchanges(after) if op.back]
    assert sorted(back) == ["%g", "%out"]
    (opaque,) = (node.op for node in after.nodes if node.op.name == "opaque")
    assert [str(value) for value in opaque.operands] == ["%out_home", "%rows"]
    assert [str(value) for value in after.outputs] == ["%y", "%z", "%g_home"]


SKIPPED: dict[str, tuple[Region, str, list[str]]] = {
    "one device": (LAYER, "place-experts{devices=1}", ["%offsets: one device needs no exchange"]),
    "placed already": (
        run(LAYER, "place-experts{devices=2}")[0],
        "place-experts{devices=2}",
        ["%offsets_away: its experts are placed already"],
    ),
    "fused": (
        run(LAYER, "fuse-experts")[0],
        "place-experts{devices=2}",
        ["%y: experts are fused; place-experts comes before fuse-experts"],
    ),
    "fused in part": (
        run(LAYER, "plan-capacity,fuse-experts")[0],
        "place-experts{devices=2}",
        ["%a: it is fused; place-experts comes first"],
    ),
    "number of experts not known": (
        variant(
            LAYER,
            ("%weights: f32[T, 2])", "%weights: f32[T, 2], %ends: i32[E + 1])"),
            ("f32[4, 32, 8]", "f32[E, 32, 8]"),
            ("f32[4, 8, 16]", "f32[E, 8, 16]"),
            ("(%rows, %offsets", "(%rows, %ends"),
            ("(%a, %offsets", "(%a, %ends"),
        ),
        "place-experts{devices=2}",
        ["%ends: the number of experts is not known, i32[E + 1]"],
    ),
    "not a weight": (
        variant(
            LAYER,
            ("%weights: f32[T, 2])", "%weights: f32[T, 2], %w: f32[4, 8, 16])"),
            ('  %w_down = weight {ref="down"} : f32[4, 8, 16]\n', ""),
            ("%w_down", "%w"),
        ),
        "place-experts{devices=2}",
        ["%w: it comes from the region's inputs and is no weight"],
    ),
    "rows of no expert are seen": (
        variant(LAYER, ("  return %y", '  %z = opaque(%a) {graph="g"} : f32[1]\n  return %y, %z')),
        "place-experts{devices=2}",
        ["%a: opaque would see rows of no expert as 0"],
    ),
    "rows of no expert are an output": (
        variant(LAYER, ("return %y", "return %y, %a")),
        "place-experts{devices=2}",
        ["%a: the region's outputs would see rows of no expert as 0"],
    ),
}


@pytest.mark.parametrize("case", SKIPPED)
def test_says_why(case: str) -> None:
    region, passes, reasons = SKIPPED[case]
    after, (log,) = run(region, passes)
    assert log.skipped == reasons
    assert (after, log.done) == (region, [])


def test_a_site_that_fails_does_not_keep_another_from_its_devices() -> None:
    region = variant(
        run(LAYER, "plan-capacity,fuse-experts")[0],
        (
            "  return %y",
            """  %order2, %offsets2 = group(%experts) {experts=4} : i32[2T], i32[5]
  %rows2 = gather(%y, %order2) {k=2} : f32[2T, 8]
  %h2 = grouped_linear(%rows2, %offsets2, %w_gate_up) : f32[2T, 32]
  %y2 = combine(%h2, %order2, %weights) : f32[T, 32]
  return %y2""",
        ),
    )
    after, (log,) = run(region, [PlaceExperts(devices=2)])
    assert log.skipped == ["%a: it is fused; place-experts comes first"]
    assert log.done == ["%offsets2: 4 experts on 2 devices, 2 + 2"]
    assert len(exchanges(after)) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": 0}, "[MOEC304] place-experts: devices=0 must be at least 1"),
        (
            {"devices": 2, "owners": (0, 2)},
            "[MOEC304] place-experts: owners=(0, 2) must be one device in 0..1 per expert",
        ),
        ({"devices": 2, "owners": ()}, "[MOEC304] place-experts: owners=() must be one device in 0..1 per expert"),
        ({"devices": 2, "owners": [0, 1]}, "[MOEC303] place-experts: owners=[0, 1] is not of type tuple of int | none"),
        ({"devices": 2.0}, "[MOEC303] place-experts: devices=2.0 is not of type int"),
    ],
)
def test_checks_its_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(MoecError) as error:
        PlaceExperts(**options)  # type: ignore[arg-type]
    assert str(error.value) == message


def test_owners_of_another_number_of_experts_are_an_error() -> None:
    with pytest.raises(MoecError) as error:
        run(LAYER, [PlaceExperts(devices=2, owners=(0, 1))])
    assert str(error.value) == (
        "[MOEC310] place-experts: owners names 2 devices but %offsets has 4 experts\n"
        "  hint: give one device for each expert, or leave owners out for round-robin"
    )
