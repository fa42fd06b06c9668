"""fuse-experts: why a site is left alone or fused in part, and what the log says."""

from __future__ import annotations

import pytest

from moec.ir import ExpertFfn, ExpertGlu, Region, parse
from moec.passes import FuseExperts, PlaceExperts
from moec.pipeline import run
from tests.passes.layers import dense_layer, mixtral_layer
from tests.passes.variant import skipped, variant

LAYER = mixtral_layer("moe", e=4, k=2, d=8, f=16)
PAIR = mixtral_layer("moe", e=4, k=2, d=8, f=16, layout="pair")
DENSE = dense_layer("ffn", d=8, f=16)
DENSE_PAIR = dense_layer("ffn", d=8, f=16, layout="pair")
SIGMOID = mixtral_layer("moe", e=4, k=2, d=8, f=16, layout="none", fn="sigmoid")
DROPPING = run(SIGMOID, "plan-capacity")[0]
ONE_MORE = "  %order2, %offsets2 = group(%experts) {experts=4} : i32[2T], i32[5]\n"

# Nothing is fused at all.
HEAD: dict[str, tuple[Region, str]] = {
    "exchange": (run(LAYER, "place-experts{devices=2}")[0], "%h: its rows come from exchange, not from gather"),
    "weights on the input": (
        mixtral_layer("moe", e=4, k=2, d=8, f=16, on_input=True),
        "%h: its rows come from scale_rows, not from gather",
    ),
    "gathered by something else": (
        variant(
            LAYER,
            ("%weights: f32[T, 2])", "%weights: f32[T, 2], %o: i32[2T])"),
            ("gather(%x, %order)", "gather(%x, %o)"),
        ),
        "%o: it comes from the region's inputs, not from group",
    ),
    "offsets of another group": (
        variant(LAYER, ("  %rows =", f"{ONE_MORE}  %rows ="), ("linear(%rows, %offsets,", "linear(%rows, %offsets2,")),
        "%h: %offsets2 are not the offsets of %order",
    ),
    "half of the pair is no product": (
        variant(PAIR, ("  %a = glu(%g,", "  %v = mul(%g, %g) : f32[2T, 16]\n  %a = glu(%v,")),
        "%a: %v comes from mul, not from a product",
    ),
    "two kinds of product": (
        variant(
            PAIR,
            ("grouped_linear(%rows, %offsets, %w_up)", "linear(%rows, %w_up)"),
            ('{ref="up"} : f32[4, 16, 8]', '{ref="up"} : f32[16, 8]'),
        ),
        "%a: %g and %u are grouped_linear and linear",
    ),
    "different rows": (
        variant(
            PAIR,
            ("  %w_up =", "  %more = mul(%rows, %rows) : f32[2T, 8]\n  %w_up ="),
            ("linear(%rows, %offsets, %w_up", "linear(%more, %offsets, %w_up"),
        ),
        "%a: %g and %u multiply different rows, %rows and %more",
    ),
    "different offsets": (
        variant(
            PAIR,
            ("  %rows =", f"{ONE_MORE}  %rows ="),
            ("linear(%rows, %offsets, %w_up", "linear(%rows, %offsets2, %w_up"),
        ),
        "%a: %g and %u have different offsets",
    ),
    "product used elsewhere": (
        variant(
            LAYER, ("  %w_down =", "  %m = mul(%h, %h) : f32[2T, 32]\n  %w_down ="), ("return %y", "return %y, %m")
        ),
        "%h: it is also used by mul",
    ),
    "product is an output": (
        variant(LAYER, ("return %y", "return %y, %h")),
        "%h: it is also an output of the region",
    ),
    "int8 rows": (
        variant(
            run(DENSE, "quantize-experts")[0],
            ("  %w_gate_up =", "  %q, %s = quantize_rows(%x) : i8[T, 8], f32[T, 1]\n  %w_gate_up ="),
            (
                "linear(%x, %w_gate_up_q, scale=%w_gate_up_scale)",
                'linear(%q, %w_gate_up_q, scale=%w_gate_up_scale, x_scale=%s) {dtype="f32"}',
            ),
        ),
        "%h: its rows are int8",
    ),
    "another result type": (
        parse(
            """region ffn(%x: bf16[T, 8]) {
  %w_up = weight {ref="up"} : bf16[16, 8]
  %h = linear(%x, %w_up) {dtype="f32"} : f32[T, 16]
  %a = act(%h) {fn="gelu"} : f32[T, 16]
  %w_down = weight {ref="down"} : f32[8, 16]
  %y = linear(%a, %w_down) : f32[T, 8]
  return %y
}"""
        ),
        "%h: its result is f32 and its rows are bf16",
    ),
    "dense, used by another op": (
        variant(
            DENSE,
            ("  %y = linear(%a, %w_down)", "  %y = mul(%a, %a)"),
            (": f32[T, 8]\n  return", ": f32[T, 16]\n  return"),
        ),
        "%a: it goes into mul, not into a second linear",
    ),
    "dense, activation is the output": (
        variant(DENSE, ("  %y = linear(%a, %w_down) : f32[T, 8]\n", ""), ("return %y", "return %a")),
        "%a: it is an output",
    ),
    "dense, activation is also an output": (
        variant(DENSE, ("return %y", "return %y, %a")),
        "%a: it is also an output of the region",
    ),
    "dense, used twice": (
        variant(DENSE, ("  return %y", "  %z = linear(%a, %w_down) : f32[T, 8]\n  return %y, %z")),
        "%a: it is used by linear and linear, not by a second product alone",
    ),
    "dense, not used": (
        variant(
            DENSE,
            ("  %y = linear(%a, %w_down)", "  %y = linear(%x, %w)"),
            ("%w_down =", "%w ="),
            ("down", "other"),
            ("[8, 16]", "[8, 8]"),
        ),
        "%a: it does not go into a second product",
    ),
    "dense before experts": (
        variant(
            LAYER,
            ("grouped_linear(%rows, %offsets, %w_gate_up)", "linear(%rows, %w_gate_up)"),
            ("f32[4, 32, 8]", "f32[32, 8]"),
        ),
        "%a: it goes into grouped_linear, not into a second linear",
    ),
    "no activation": (
        parse(
            """region moe(%x: f32[T, 8], %experts: i32[T, 2], %weights: f32[T, 2]) {
  %order, %offsets = group(%experts) {experts=4} : i32[2T], i32[5]
  %rows = gather(%x, %order) {k=2} : f32[2T, 8]
  %w = weight {ref="w"} : f32[4, 8, 8]
  %out = grouped_linear(%rows, %offsets, %w) : f32[2T, 8]
  %y = combine(%out, %order, %weights) : f32[T, 8]
  return %y
}"""
        ),
        "%y: no activation between two products comes before it",
    ),
}

# The head becomes expert_glu.
TAIL: dict[str, tuple[Region, str]] = {
    "capacity": (
        run(LAYER, "plan-capacity{tokens=64}")[0],
        "%order: slots past capacity 48 are dropped, and expert_ffn drops none",
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
        "%order: experts choose tokens",
    ),
    "another k": (variant(LAYER, ("{k=2}", "{k=1}")), "%rows: gather has k=1 but a token has 2 choices"),
    "another number of tokens": (
        variant(LAYER, ("%x: f32[T, 8]", "%x: f32[S, 8]")),
        "%rows: %x is f32[S, 8] but %experts i32[T, 2]",
    ),
    "activation used elsewhere": (
        variant(
            LAYER, ("  %w_down =", "  %m = mul(%a, %a) : f32[2T, 16]\n  %w_down ="), ("return %y", "return %y, %m")
        ),
        "%a: it is used by mul and grouped_linear, not by a second product alone",
    ),
    "another op behind": (
        variant(
            LAYER,
            ("grouped_linear(%a, %offsets, %w_down)", "mul(%a, %a)"),
            ("%out = mul(%a, %a) : f32[2T, 8]", "%out = mul(%a, %a) : f32[2T, 16]"),
            ("[T, 8]\n  return", "[T, 16]\n  return"),
        ),
        "%a: it goes into mul, not into a second grouped_linear",
    ),
    "other offsets behind": (
        variant(LAYER, ("  %rows =", f"{ONE_MORE}  %rows ="), ("linear(%a, %offsets,", "linear(%a, %offsets2,")),
        "%out: other offsets than %h",
    ),
    "no combine": (
        variant(LAYER, ("  %y = combine(%out, %order, %weights) : f32[T, 8]\n", ""), ("return %y", "return %out")),
        "%out: it is an output",
    ),
    "scaled behind": (
        variant(
            LAYER, ("combine(%out, %order, %weights) : f32[T, 8]", "scale_rows(%out, %order, %weights) : f32[2T, 8]")
        ),
        "%out: it goes into scale_rows, not into combine",
    ),
    "combined by expert": (
        variant(
            LAYER,
            ("combine(%out, %order, %weights)", 'combine(%out, %order, %weights) {by="expert", tokens=T}'),
        ),
        "%y: it combines by expert",
    ),
    "another order": (
        variant(LAYER, ("  %rows =", f"{ONE_MORE}  %rows ="), ("(%out, %order,", "(%out, %order2,")),
        "%y: it combines in the order %order2, but the rows are in %order",
    ),
    "weights of another shape": (
        variant(LAYER, ("%weights: f32[T, 2]", "%weights: f32[2T, 1]"), ("[T, 8]\n  return", "[2T, 8]\n  return")),
        "%y: %weights and %experts differ in shape",
    ),
}


@pytest.mark.parametrize("case", HEAD)
def test_says_why_it_did_not_fuse(case: str) -> None:
    region, reason = HEAD[case]
    after, (log,) = run(region, [FuseExperts()])
    assert log.skipped == [reason]
    assert (after, log.done) == (region, [])


@pytest.mark.parametrize("case", TAIL)
def test_says_why_only_the_head_was_fused(case: str) -> None:
    region, reason = TAIL[case]
    after, (log,) = run(region, [FuseExperts()])
    assert log.skipped == [reason]
    assert log.done == ["%a: gather, grouped_linear and glu became expert_glu"]
    assert any(isinstance(node.op, ExpertGlu) for node in after.nodes)
    assert run(region, [FuseExperts(partial=False)])[0] == region


def test_experts_on_devices_are_not_fused() -> None:
    _, (_, log) = run(PAIR, [PlaceExperts(devices=2), FuseExperts()])
    assert log.skipped == ["%g: its rows come from exchange, not from gather"]


def test_an_activation_away_from_products_is_no_site() -> None:
    assert (
        skipped(parse('region r(%x: f32[T]) {\n  %y = act(%x) {fn="silu"} : f32[T]\n  return %y\n}'), "fuse-experts")
        == []
    )


# Rows of no expert are 0 in expert_glu, and sigmoid(0) without it.
def test_rows_of_no_expert_stay_hidden_from_those_who_would_see_them() -> None:
    seen = variant(DROPPING, ("  return %y", "  %z = mul(%a, %a) : f32[2T, 16]\n  return %y, %z"))
    assert skipped(seen, "fuse-experts") == [
        "%order: slots past capacity 16*ceildiv(5T, 128) are dropped, and expert_ffn drops none",
        "%a: mul would see rows of no expert as 0 instead of sigmoid(0)",
    ]


def test_rows_of_no_expert_stay_hidden_from_the_outputs() -> None:
    seen = variant(DROPPING, ("return %y", "return %y, %a"))
    assert skipped(seen, "fuse-experts")[1:] == ["%a: rows of no expert would become 0 instead of sigmoid(0)"]


def test_rows_of_no_expert_do_not_matter_to_products_and_combine() -> None:
    _, (log,) = run(DROPPING, [FuseExperts()])
    assert log.done == ["%a: gather, grouped_linear and act became expert_glu"]
    direct = variant(DROPPING, ("combine(%out,", "combine(%a,"), ("[T, 8]\n  return", "[T, 16]\n  return"))
    assert run(direct, [FuseExperts()])[1][0].done == ["%a: gather, grouped_linear and act became expert_glu"]


@pytest.mark.parametrize("fn", ["identity", "silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "tanh"])
def test_functions_that_are_zero_at_zero_may_be_seen(fn: str) -> None:
    layer = mixtral_layer("moe", e=4, k=2, d=8, f=16, layout="none", fn=fn)
    _, (log,) = run(variant(layer, ("return %y", "return %y, %a")), [FuseExperts()])
    assert log.done == ["%a: gather, grouped_linear and act became expert_glu"]


def test_a_gate_without_shift_hides_what_the_function_is_at_zero() -> None:
    for shift, fused in ((0.0, 1), (1.0, 0)):
        layer = mixtral_layer("moe", e=4, k=2, d=8, f=16, layout="pair", fn="sigmoid", up_shift=shift)
        _, (log,) = run(variant(layer, ("return %y", "return %y, %a")), [FuseExperts()])
        assert len(log.done) == fused


def test_other_users_of_the_rows_keep_gather_and_group() -> None:
    region = variant(LAYER, ("return %y", "return %y, %rows"))
    after, (log,) = run(region, [FuseExperts()])
    assert log.skipped == []
    assert [node.op.name for node in after.nodes] == ["group", "gather", "weight", "weight", "expert_ffn"]


def test_two_layers_in_one_region_are_both_fused() -> None:
    two = variant(
        LAYER,
        (
            "  return %y",
            """  %order2, %offsets2 = group(%experts) {experts=4} : i32[2T], i32[5]
  %rows2 = gather(%y, %order2) {k=2} : f32[2T, 8]
  %h2 = grouped_linear(%rows2, %offsets2, %w_gate_up) : f32[2T, 32]
  %a2 = glu(%h2) {fn="silu", layout="concat"} : f32[2T, 16]
  %out2 = grouped_linear(%a2, %offsets2, %w_down) : f32[2T, 8]
  %y2 = combine(%out2, %order2, %weights) : f32[T, 8]
  return %y2""",
        ),
    )
    after, (log,) = run(two, [FuseExperts()])
    assert sum(isinstance(node.op, ExpertFfn) for node in after.nodes) == 2
    assert len(log.done) == 2
    assert log.skipped == []
