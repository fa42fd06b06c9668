"""merge-gate-up: why a site is left alone, and what the log says."""

from __future__ import annotations

import pytest

from moec.ir import Region
from moec.passes import MergeGateUp
from moec.pipeline import run
from tests.passes.layers import dense_layer, mixtral_layer
from tests.passes.variant import skipped, variant

PAIR = mixtral_layer("moe", e=4, k=2, d=8, f=16, layout="pair", bias=True)
DENSE = dense_layer("ffn", d=8, f=16, layout="pair")
INT8 = run(DENSE, "quantize-experts")[0]
FUSED = run(PAIR, "fuse-experts")[0]
GATE = "grouped_linear(%rows, %offsets, %w_gate, b=%w_gate_bias)"
UP = "grouped_linear(%rows, %offsets, %w_up, b=%w_up_bias)"
INT8_ROWS = """  %q1, %s1 = quantize_rows(%x) : i8[T, 8], f32[T, 1]
  %q2, %s2 = quantize_rows(%x) {groups=2} : i8[T, 8], f32[T, 2]
"""

SKIPPED: dict[str, tuple[Region, str]] = {
    "not a product": (
        variant(DENSE, ("  %a = glu(%g,", '  %v = act(%g) {fn="tanh"} : f32[T, 16]\n  %a = glu(%v,')),
        "%a: %v comes from act, not from a product",
    ),
    "an input": (
        variant(DENSE, ("(%x: f32[T, 8])", "(%x: f32[T, 8], %z: f32[T, 16])"), ("glu(%g,", "glu(%z,")),
        "%a: %z comes from the region's inputs, not from a product",
    ),
    "one product": (variant(DENSE, ("glu(%g, %u)", "glu(%g, %g)")), "%a: gate and up are both %g"),
    "two kinds": (
        variant(
            PAIR,
            (UP, "linear(%rows, %w_up)"),
            ('{ref="up"} : f32[4, 16, 8]', '{ref="up"} : f32[16, 8]'),
        ),
        "%a: %g is a grouped_linear but %u is a linear",
    ),
    "different rows": (
        variant(
            PAIR, ("  %g =", "  %more = mul(%rows, %rows) : f32[2T, 8]\n  %g ="), (UP, UP.replace("%rows", "%more"))
        ),
        "%a: %g and %u multiply different rows, %rows and %more",
    ),
    "different offsets": (
        variant(
            PAIR,
            ("  %rows =", "  %order2, %offsets2 = group(%experts) {experts=4} : i32[2T], i32[5]\n  %rows ="),
            (UP, UP.replace("%offsets", "%offsets2")),
        ),
        "%a: %g and %u have different offsets, %offsets and %offsets2",
    ),
    "different x_scale": (
        variant(
            INT8,
            ("  %w_gate =", f"{INT8_ROWS}  %w_gate ="),
            (
                "linear(%x, %w_gate_q, scale=%w_gate_scale)",
                'linear(%q1, %w_gate_q, scale=%w_gate_scale, x_scale=%s1) {dtype="f32"}',
            ),
            (
                "linear(%x, %w_up_q, scale=%w_up_scale)",
                'linear(%q1, %w_up_q, scale=%w_up_scale, x_scale=%s2) {dtype="f32"}',
            ),
        ),
        "%a: %g and %u have different x_scale",
    ),
    "weights of two types": (
        variant(
            INT8,
            ("linear(%x, %w_up_q, scale=%w_up_scale)", "linear(%x, %w_up)"),
            ("  %w_up_q, %w_up_scale = quantize_weight(%w_up) : i8[16, 8], f32[16]\n", ""),
        ),
        "%a: the weights of gate and up differ, i8[16, 8] and f32[16, 8]",
    ),
    "bias of the gate alone": (variant(PAIR, (", b=%w_up_bias", "")), "%a: gate alone has biases"),
    "bias of up alone": (variant(PAIR, (", b=%w_gate_bias", "")), "%a: up alone has biases"),
    "biases of two types": (
        variant(
            mixtral_layer("moe", e=4, k=2, d=8, f=16, layout="pair", bias=True, dtype="bf16"),
            ('{ref="up_bias"} : bf16[4, 16]', '{ref="up_bias"} : f32[4, 16]'),
        ),
        "%a: the biases of gate and up differ, bf16[4, 16] and f32[4, 16]",
    ),
    "gate used elsewhere": (
        variant(DENSE, ("  %w_down =", "  %m = mul(%g, %g) : f32[T, 16]\n  %w_down ="), ("return %y", "return %y, %m")),
        "%g: it is also used by mul",
    ),
    "up is an output": (variant(DENSE, ("return %y", "return %y, %u")), "%u: it is also an output of the region"),
    "not a weight": (
        variant(
            DENSE,
            ("(%x: f32[T, 8])", "(%x: f32[T, 8], %w: f32[16, 8])"),
            ('  %w_up = weight {ref="up"} : f32[16, 8]\n', ""),
            ("linear(%x, %w_up)", "linear(%x, %w)"),
        ),
        "%w: it comes from the region's inputs and is no weight",
    ),
    "weight of unknown size": (
        variant(DENSE, ("f32[16, 8]", "f32[F, 8]"), ("f32[T, 16]", "f32[T, F]"), ("f32[8, 16]", "f32[8, F]")),
        "%w_gate: its size f32[F, 8] is not known",
    ),
    "fused, bias of up alone": (variant(FUSED, (", b_in=%w_gate_bias", "")), "%y: up alone has biases"),
}


@pytest.mark.parametrize("case", SKIPPED)
def test_says_why(case: str) -> None:
    region, reason = SKIPPED[case]
    after, (log,) = run(region, [MergeGateUp()])
    assert log.skipped == [reason]
    assert after == region
    assert log.done == []


@pytest.mark.parametrize("layout", ["concat", "concat_up_first", "interleaved", "none"])
def test_one_product_is_no_site(layout: str) -> None:
    assert skipped(mixtral_layer("moe", e=4, k=2, d=8, f=16, layout=layout), "merge-gate-up") == []


def test_counts_the_bytes_it_copies() -> None:
    _, (log,) = run(PAIR, [MergeGateUp()])
    assert log.numbers == {"bytes_copied": 4 * (2 * 4 * 16 * 8 + 2 * 4 * 16)}


def test_joins_in_the_middle_of_a_region_that_keeps_its_other_nodes() -> None:
    region = variant(PAIR, ("return %y", "return %y, %rows"))
    after, (log,) = run(region, [MergeGateUp()])
    assert log.skipped == []
    assert [value.name for value in after.outputs] == ["y", "rows"]
    assert sum(node.op.name == "grouped_linear" for node in after.nodes) == 2
