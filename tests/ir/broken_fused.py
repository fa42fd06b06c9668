"""Broken type rules of fused ops: line, operands, code and message."""

from __future__ import annotations

OPERANDS = (
    "x: f32[T, 64], x0: f32[], x1: f32[T], xi: i32[T, 64], experts: i32[T, 2], e1: i32[T], ef: f32[T, 2], "
    "weights: f32[T, 2], wi: i32[T, 2], w1: f32[T], s: i32[S, 2], order: i32[2T], offsets: i32[9], "
    "w96: f32[8, 96, 64], w95: f32[8, 95, 64], w48: f32[8, 48, 64], up: f32[8, 48, 64], b96: f32[8, 96], "
    "b48: f32[8, 48], down: f32[8, 32, 48], down7: f32[7, 32, 48], b32: f32[8, 32], q: i8[8, 96, 64], "
    "s96: f32[8, 96], d2: f32[96, 64], d_down: f32[32, 48]"
)

BROKEN = [
    # fused
    (
        'expert_glu(%x1, %order, %offsets, %w96) {fn="silu", layout="concat", k=2}',
        OPERANDS,
        "MOEC103",
        "x must have 2 sizes, found f32[T]",
    ),
    (
        'expert_glu(%xi, %order, %offsets, %w96) {fn="silu", layout="concat", k=2}',
        OPERANDS,
        "MOEC104",
        "x must hold floating point numbers, found i32[T, 64]",
    ),
    (
        'expert_glu(%x, %x1, %offsets, %w96) {fn="silu", layout="concat", k=2}',
        OPERANDS,
        "MOEC104",
        "order must hold i32 or i64, found f32[T]",
    ),
    (
        'expert_glu(%x, %experts, %offsets, %w96) {fn="silu", layout="concat", k=2}',
        OPERANDS,
        "MOEC103",
        "order must have 1 size, found i32[T, 2]",
    ),
    (
        'expert_glu(%x, %order, %offsets, %w96) {fn="silu", layout="concat", k=0}',
        OPERANDS,
        "MOEC102",
        "k=0 must be at least 1",
    ),
    (
        'expert_glu(%x, %order, %offsets, %d2) {fn="silu", layout="concat", k=2}',
        OPERANDS,
        "MOEC103",
        "w must have 3 sizes, found f32[96, 64]",
    ),
    (
        'expert_glu(%x, %order, %offsets, %w96) {fn="silu", layout="paired", k=2}',
        OPERANDS,
        "MOEC102",
        'layout="paired" must be one of none, pair, concat, concat_up_first, interleaved, interleaved_up_first',
    ),
    (
        'expert_ffn(%x, %experts, %weights, %w48, %down) {fn="relu", layout="none", up_shift=1.0}',
        OPERANDS,
        "MOEC106",
        'up_shift=1.0 needs a gate, and layout="none" has none',
    ),
    (
        'expert_ffn(%x, %experts, %weights, %w48, %down) {fn="silu", layout="pair"}',
        OPERANDS,
        "MOEC106",
        'layout="pair" needs w_up',
    ),
    (
        'expert_ffn(%x, %experts, %weights, %w96, %down, w_up=%up) {fn="silu", layout="concat"}',
        OPERANDS,
        "MOEC106",
        'w_up goes with layout="pair", not with layout="concat"',
    ),
    (
        'expert_ffn(%x, %experts, %weights, %w96, %down, b_up=%b48) {fn="silu", layout="concat"}',
        OPERANDS,
        "MOEC106",
        "b_up and scale_up go with w_up",
    ),
    (
        'expert_ffn(%x, %experts, %weights, %w48, %down, w_up=%w96) {fn="silu", layout="pair"}',
        OPERANDS,
        "MOEC105",
        "w_up must be [8, 48, 64] like the gate's weights f32[8, 48, 64], found f32[8, 96, 64]",
    ),
    (
        'expert_ffn(%x, %experts, %weights, %w95, %down) {fn="silu", layout="concat"}',
        OPERANDS,
        "MOEC105",
        "w_in must have an even number of rows for gate and up, found f32[8, 95, 64]",
    ),
    (
        'expert_ffn(%x1, %experts, %weights, %w96, %down) {fn="silu", layout="concat"}',
        OPERANDS,
        "MOEC103",
        "x must have 2 sizes, found f32[T]",
    ),
    (
        'expert_ffn(%x, %e1, %weights, %w96, %down) {fn="silu", layout="concat"}',
        OPERANDS,
        "MOEC103",
        "experts must have 2 sizes, found i32[T]",
    ),
    (
        'expert_ffn(%x, %ef, %weights, %w96, %down) {fn="silu", layout="concat"}',
        OPERANDS,
        "MOEC104",
        "experts must hold i32 or i64, found f32[T, 2]",
    ),
    (
        'expert_ffn(%x, %experts, %wi, %w96, %down) {fn="silu", layout="concat"}',
        OPERANDS,
        "MOEC104",
        "weights must hold floating point numbers, found i32[T, 2]",
    ),
    (
        'expert_ffn(%x, %s, %weights, %w96, %down) {fn="silu", layout="concat"}',
        OPERANDS,
        "MOEC105",
        "the tokens of experts i32[S, 2] must be T like x f32[T, 64], found S",
    ),
    (
        'expert_ffn(%x, %experts, %w1, %w96, %down) {fn="silu", layout="concat"}',
        OPERANDS,
        "MOEC105",
        "weights must be [T, 2] like experts i32[T, 2], found f32[T]",
    ),
    (
        'expert_ffn(%xi, %experts, %weights, %w96, %down) {fn="silu", layout="concat"}',
        OPERANDS,
        "MOEC104",
        "x must hold floating point numbers, found i32[T, 64]",
    ),
    (
        'expert_ffn(%x, %experts, %weights, %d2, %down) {fn="silu", layout="concat"}',
        OPERANDS,
        "MOEC103",
        "w_in must have 3 sizes, found f32[96, 64]",
    ),
    (
        'expert_ffn(%x, %experts, %weights, %w96, %d_down) {fn="silu", layout="concat"}',
        OPERANDS,
        "MOEC103",
        "w_out must have 3 sizes, found f32[32, 48]",
    ),
    (
        'expert_ffn(%x, %experts, %weights, %w96, %down7) {fn="silu", layout="concat"}',
        OPERANDS,
        "MOEC105",
        "the experts of w_out must be 8 like w_in f32[8, 96, 64], found 7",
    ),
    (
        'expert_ffn(%x, %experts, %weights, %w48, %down, b_out=%b48) {fn="relu", layout="none"}',
        OPERANDS,
        "MOEC105",
        "b_out must be [8, 32] for weights f32[8, 32, 48], found f32[8, 48]",
    ),
    (
        'dense_ffn(%x0, %d2, %d_down) {fn="silu", layout="concat"}',
        OPERANDS,
        "MOEC103",
        "x must have at least 1 size, found f32[]",
    ),
    (
        'expert_ffn(%x, %experts, %weights, %w96, %down) {fn="silu", layout="paired"}',
        OPERANDS,
        "MOEC102",
        'layout="paired" must be one of none, pair, concat, concat_up_first, interleaved, interleaved_up_first',
    ),
    (
        'dense_ffn(%x, %d2, %d_down) {fn="silu", layout="paired"}',
        OPERANDS,
        "MOEC102",
        'layout="paired" must be one of none, pair, concat, concat_up_first, interleaved, interleaved_up_first',
    ),
]
