"""The type rule of each op, on operands that fit."""

from __future__ import annotations

import pytest

from moec.ir import OPS
from tests.ir.build import read, result_types

MOE = "x: f32[T, 64], experts: i32[T, 2], weights: f32[T, 2], order: i32[2T], offsets: i32[9], rows: f32[2T, 64]"
FFN = (
    "x: bf16[T, 64], experts: i64[T, 2], weights: f32[T, 2], order: i32[2T], offsets: i32[9], "
    "w96: bf16[8, 96, 64], w48: bf16[8, 48, 64], up: bf16[8, 48, 64], down: bf16[8, 32, 48], b96: bf16[8, 96], "
    "b48: f32[8, 48], b32: bf16[8, 32], q: i8[8, 96, 64], s96: f32[8, 96], q_down: i8[8, 32, 48], s32: f32[8, 32], "
    "d96: bf16[96, 64], d48: bf16[48, 64], d_up: bf16[48, 64], d_down: bf16[32, 48], c96: bf16[96], c32: bf16[32]"
)

RULES = [
    # routing
    ("route(%logits) {k=2}", "logits: f32[T, 8]", "f32[T, 2], i32[T, 2]"),
    ("route(%logits) {k=9}", "logits: bf16[T, E]", "f32[T, 9], i32[T, 9]"),
    (
        'route(%logits, bias=%b, noise=%n) {k=4, score="sigmoid", groups=4, kept_groups=2, group_score="top2"}',
        "logits: f32[T, 16], b: f32[16], n: f32[T, 16]",
        "f32[T, 4], i32[T, 4]",
    ),
    ('route(%logits) {k=2, normalize="norm", p=2.0}', "logits: f32[5, 8]", "f32[5, 2], i32[5, 2]"),
    (
        "route_experts(%logits) {capacity=ceildiv(2T, 8)}",
        "logits: f32[T, 8]",
        "f32[8, ceildiv(T, 4)], i32[8, ceildiv(T, 4)]",
    ),
    # grouping
    ("group(%experts) {experts=8}", MOE, "i32[2T], i32[9]"),
    ("group(%experts) {experts=8, capacity=ceildiv(5T, 16)}", MOE, "i32[2T], i32[9]"),
    (
        'group(%experts, %weights) {experts=8, capacity=4, policy="weight", scope="sequence", sequence=S}',
        MOE,
        "i32[2T], i32[9]",
    ),
    ('group(%ids) {experts=8, by="expert"}', "ids: i32[8, C]", "i32[8C], i32[9]"),
    ("gather(%x, %order) {k=2}", MOE, "f32[2T, 64]"),
    ("exchange(%rows, %offsets) {owners=[0, 1, 0, 1, 2, 2, 0, 0], devices=4}", MOE, "f32[2T, 64], i32[9]"),
    ("exchange(%rows, %offsets) {owners=[0, 1, 0, 1, 2, 2, 0, 0], devices=4, back=true}", MOE, "f32[2T, 64], i32[9]"),
    # products
    ("linear(%x, %w)", "x: f32[T, 64], w: f32[96, 64]", "f32[T, 96]"),
    ("linear(%x, %w, b=%b)", "x: bf16[B, S, 64], w: bf16[96, 64], b: f32[96]", "bf16[B, S, 96]"),
    ("linear(%x, %w, scale=%s)", "x: f16[64], w: i8[96, 64], s: f32[96]", "f16[96]"),
    ('linear(%x, %w) {dtype="f32"}', "x: bf16[T, 64], w: bf16[96, 64]", "f32[T, 96]"),
    (
        'linear(%x, %w, scale=%s, x_scale=%xs) {dtype="bf16"}',
        "x: i8[T, 64], w: i8[96, 64], s: f32[96], xs: f32[T, 4]",
        "bf16[T, 96]",
    ),
    ("grouped_linear(%rows, %offsets, %w)", MOE + ", w: f32[8, 96, 64]", "f32[2T, 96]"),
    ("grouped_linear(%rows, %offsets, %w, b=%b)", MOE + ", w: f32[8, 96, 64], b: f32[8, 96]", "f32[2T, 96]"),
    ("grouped_linear(%rows, %offsets, %w, scale=%s)", MOE + ", w: i8[8, 96, 64], s: f32[8, 96]", "f32[2T, 96]"),
    ("quantize_rows(%rows)", MOE, "i8[2T, 64], f32[2T, 1]"),
    ("quantize_rows(%x) {groups=4}", "x: bf16[B, S, 64]", "i8[B, S, 64], f32[B, S, 4]"),
    # activations
    ('act(%x) {fn="relu"}', MOE, "f32[T, 64]"),
    ('act(%x) {fn="silu", alpha=1.702, limit=7.0, clamp_after=true}', MOE, "f32[T, 64]"),
    ('glu(%g, %u) {fn="silu"}', "g: f32[R, 48], u: f32[R, 48]", "f32[R, 48]"),
    ('glu(%h) {fn="silu", layout="interleaved", limit=7.0, up_shift=1.0}', "h: bf16[R, 96]", "bf16[R, 48]"),
    ('glu(%h) {fn="gelu", layout="concat_up_first"}', "h: f32[R, 2F]", "f32[R, F]"),
    # combining
    ("combine(%rows, %order, %weights)", MOE, "f32[T, 64]"),
    (
        'combine(%rows, %order, %w) {by="expert", tokens=T}',
        "rows: bf16[8C, 64], order: i32[8C], w: f32[8, C]",
        "bf16[T, 64]",
    ),
    ("scale_rows(%rows, %order, %weights)", MOE, "f32[2T, 64]"),
    ('kept_weights(%weights, %order) {normalize="sum", eps=1e-09}', MOE, "f32[T, 2]"),
    ("identity_rows(%x, %experts, %weights) {first=8, count=2}", MOE, "f32[T, 64]"),
    ('norm(%x) {kind="rms", eps=1e-06}', MOE, "f32[T, 64]"),
    ('norm(%x, w=%w, b=%b) {kind="layer", eps=1e-05}', "x: bf16[B, S, 64], w: f32[64], b: bf16[64]", "bf16[B, S, 64]"),
    ('norm(%rows, offsets=%offsets, w=%w) {kind="rms", eps=0.0, w_shift=1.0}', MOE + ", w: f32[8, 64]", "f32[2T, 64]"),
    ('norm(%rows, offsets=%offsets, b=%b) {kind="layer", eps=0.0}', MOE + ", b: f32[8, 64]", "f32[2T, 64]"),
    ('norm(%rows, offsets=%offsets, w=%w) {kind="none", eps=0.0}', MOE + ", w: f32[8, 64]", "f32[2T, 64]"),
    ("batch_norm(%rows, %offsets, %m, %v, b=%m) {eps=1e-05}", MOE + ", m: f32[8, 64], v: f32[8, 64]", "f32[2T, 64]"),
    # dense dispatch
    ("dispatch_dense(%x, %w) {softmax=true}", "x: f32[T, 64], w: f32[T, 8, 4]", "f32[32, 64], i32[9]"),
    ("combine_dense(%rows, %w)", "rows: bf16[E*C, 64], w: f32[T, E, C]", "bf16[T, 64]"),
    # elementwise
    ('pointwise(%a) {formula="a * sigmoid(a)"}', "a: bf16[2T, 64]", "bf16[2T, 64]"),
    ('pointwise(%a, %b) {formula="tanh(a) * b"}', "a: f32[T, 8], b: f32[T, 8]", "f32[T, 8]"),
    ("add(%a, %b)", "a: f32[T, 64], b: f32[T, 64]", "f32[T, 64]"),
    ("add(%a, %b)", "a: f32[64], b: f32[T, 64]", "f32[T, 64]"),
    ("mul(%a, %b)", "a: f32[T, 1], b: f32[T, 64]", "f32[T, 64]"),
    ("mul(%a, %b)", "a: i32[], b: i32[T]", "i32[T]"),
    # weights
    ('weight {ref="experts.gate_up"} : bf16[8, 96, 64]', "", "bf16[8, 96, 64]"),
    ("constant {value=1.0} : f32[T, 2]", "", "f32[T, 2]"),
    ("constant {value=1.0} : bool[T]", "", "bool[T]"),
    ("concat_weights(%a, %b) {axis=1}", "a: f32[8, 48, 64], b: f32[8, F, 64]", "f32[8, F + 48, 64]"),
    ("concat_weights(%a) {axis=0}", "a: f32[8]", "f32[8]"),
    ("select_experts(%w) {experts=[3, 1, 1]}", "w: f32[8, 48, 64]", "f32[3, 48, 64]"),
    ("select_experts(%w) {experts=[99]}", "w: i8[E, 48]", "i8[1, 48]"),
    ("quantize_weight(%w)", "w: bf16[8, 96, 64]", "i8[8, 96, 64], f32[8, 96]"),
    ("quantize_weight(%w)", "w: f32[96, 64]", "i8[96, 64], f32[96]"),
    # fused
    (
        'expert_glu(%x, %order, %offsets, %w96, b=%b96) {fn="silu", layout="concat", k=2}',
        FFN,
        "bf16[2T, 48]",
    ),
    ('expert_glu(%x, %order, %offsets, %w48, w_up=%up) {fn="silu", layout="pair", k=2}', FFN, "bf16[2T, 48]"),
    ('expert_ffn(%x, %experts, %weights, %w96, %down) {fn="silu", layout="concat"}', FFN, "bf16[T, 32]"),
    (
        'expert_ffn(%x, %experts, %weights, %w48, %down, b_in=%b48, b_out=%b32) {fn="relu", layout="none"}',
        FFN,
        "bf16[T, 32]",
    ),
    (
        'expert_ffn(%x, %experts, %weights, %w48, %down, w_up=%up, b_up=%b48) {fn="silu", layout="pair"}',
        FFN,
        "bf16[T, 32]",
    ),
    (
        'expert_ffn(%x, %experts, %weights, %q, %q_down, scale_in=%s96, scale_out=%s32) {fn="silu", layout="concat"}',
        FFN,
        "bf16[T, 32]",
    ),
    ('dense_ffn(%x, %d96, %d_down, b_in=%c96, b_out=%c32) {fn="gelu", layout="interleaved"}', FFN, "bf16[T, 32]"),
    ('dense_ffn(%x, %d48, %d_down, w_up=%d_up) {fn="silu", layout="pair", limit=10.0}', FFN, "bf16[T, 32]"),
    ('dense_ffn(%x, %d48, %d_down) {fn="relu2", layout="none"}', FFN, "bf16[T, 32]"),
    # the user's own
    ('opaque(%x, %experts) {graph="router"} : f32[T, 8], i32[N]', MOE, "f32[T, 8], i32[N]"),
    ('opaque {graph="noise"} : f32[T]', "", "f32[T]"),
]


@pytest.mark.parametrize(("line", "operands", "expected"), RULES, ids=[line for line, _, _ in RULES])
def test_type_rule(line: str, operands: str, expected: str) -> None:
    assert result_types(line, operands) == expected


def test_every_op_is_covered() -> None:
    assert {read(line, operands)[0].name for line, operands, _ in RULES} == set(OPS)
