"""Broken type rules of products and activations: line, operands, code and message."""

from __future__ import annotations

OPERANDS = (
    "x: f32[T, 64], experts: i32[T, 2], weights: f32[T, 2], order: i32[2T], offsets: i32[9], rows: f32[2T, 64], "
    "f3: f32[T, 2, 64], f1: f32[T], f0: f32[], i1: i32[T], b2: bool[T, 64], w: f32[8, 96, 64]"
)

BROKEN = [
    # linear
    ("linear(%f0, %x)", OPERANDS, "MOEC103", "x must have at least 1 size, found f32[]"),
    ("linear(%x, %w)", OPERANDS, "MOEC103", "w must have 2 sizes, found f32[8, 96, 64]"),
    (
        "linear(%x, %q)",
        "x: f32[T, 64], q: i8[96, 64]",
        "MOEC106",
        "w is i8[96, 64]: i8 weights need scale, one for each output",
    ),
    ("linear(%x, %x, scale=%f1)", OPERANDS, "MOEC106", "scale goes with i8 weights, but w is f32[T, 64]"),
    (
        "linear(%x, %q, scale=%s)",
        "x: f32[T, 64], q: i8[96, 64], s: f16[96]",
        "MOEC104",
        "scale must hold f32, found f16[96]",
    ),
    (
        "linear(%x, %q, scale=%s)",
        "x: f32[T, 64], q: i8[96, 64], s: f32[95]",
        "MOEC105",
        "scale must be [96] for w i8[96, 64], found f32[95]",
    ),
    (
        "linear(%x, %w)",
        "x: f32[T, 64], w: bf16[96, 64]",
        "MOEC104",
        "w is bf16[96, 64] but x is f32[T, 64]: they must hold the same type",
    ),
    (
        "linear(%x, %w)",
        "x: f32[T, 64], w: f32[96, 63]",
        "MOEC105",
        "the inputs of w must be 64 like the rows of f32[T, 64], found 63",
    ),
    (
        "linear(%x, %w, b=%b)",
        "x: f32[T, 64], w: f32[96, 64], b: bf16[96]",
        "MOEC104",
        "b must hold f32, found bf16[96]",
    ),
    (
        "linear(%x, %w, b=%b)",
        "x: f32[T, 64], w: f32[96, 64], b: f32[64]",
        "MOEC105",
        "b must be [96] for weights f32[96, 64], found f32[64]",
    ),
    ('linear(%x, %x) {dtype="i32"}', OPERANDS, "MOEC102", 'dtype="i32" must be one of f64, f32, f16, bf16'),
    ("linear(%b2, %x)", OPERANDS, "MOEC104", "x must hold floating point numbers, found bool[T, 64]"),
    ("linear(%x, %x, x_scale=%f1)", OPERANDS, "MOEC106", "x_scale goes with i8 rows, but x is f32[T, 64]"),
    ("linear(%q, %q)", "q: i8[T, 64]", "MOEC106", "x is i8[T, 64]: i8 rows need x_scale"),
    (
        "linear(%q, %w, x_scale=%s)",
        "q: i8[T, 64], w: f32[96, 64], s: f32[T, 1]",
        "MOEC104",
        "w must hold i8, found f32[96, 64]",
    ),
    (
        "linear(%q, %q, x_scale=%s)",
        "q: i8[T, 64], s: f32[T, 1]",
        "MOEC106",
        "i8 rows need dtype, the type of the result",
    ),
    (
        'linear(%q, %q, x_scale=%s) {dtype="f32"}',
        "q: i8[T, 64], s: f16[T, 1]",
        "MOEC104",
        "x_scale must hold f32, found f16[T, 1]",
    ),
    (
        'linear(%q, %q, x_scale=%s) {dtype="f32"}',
        "q: i8[T, 64], s: f32[T]",
        "MOEC103",
        "x_scale must have 2 sizes, found f32[T]",
    ),
    (
        'linear(%q, %q, x_scale=%s) {dtype="f32"}',
        "q: i8[T, 64], s: f32[8, 1]",
        "MOEC105",
        "x_scale must be [T, 1] for x i8[T, 64], found f32[8, 1]",
    ),
    (
        'linear(%q, %q, scale=%t, x_scale=%s) {dtype="f32"}',
        "q: i8[T, 64], s: f32[T, 3], t: f32[T]",
        "MOEC105",
        "the 3 parts of x_scale must divide the width of x i8[T, 64]",
    ),
    # grouped_linear
    ("grouped_linear(%f1, %offsets, %w)", OPERANDS, "MOEC103", "rows must have 2 sizes, found f32[T]"),
    ("grouped_linear(%rows, %offsets, %x)", OPERANDS, "MOEC103", "w must have 3 sizes, found f32[T, 64]"),
    (
        "grouped_linear(%rows, %order, %w)",
        OPERANDS,
        "MOEC105",
        "offsets must be [9] for w f32[8, 96, 64], found i32[2T]",
    ),
    # quantize_rows
    ("quantize_rows(%f0)", OPERANDS, "MOEC103", "x must have at least 1 size, found f32[]"),
    ("quantize_rows(%order)", OPERANDS, "MOEC104", "x must hold floating point numbers, found i32[2T]"),
    ("quantize_rows(%x) {groups=0}", OPERANDS, "MOEC102", "groups=0 must be at least 1"),
    ("quantize_rows(%x) {groups=3}", OPERANDS, "MOEC102", "groups=3 must divide the width of x f32[T, 64]"),
    # act, glu
    ('act(%order) {fn="relu"}', OPERANDS, "MOEC104", "x must hold floating point numbers, found i32[2T]"),
    (
        'act(%x) {fn="swish"}',
        OPERANDS,
        "MOEC102",
        'fn="swish" must be one of identity, silu, gelu, gelu_tanh, quick_gelu, relu, relu2, sigmoid, tanh, softplus',
    ),
    ('act(%x) {fn="relu", alpha=2.0}', OPERANDS, "MOEC106", 'alpha=2.0 goes with fn="silu", not with fn="relu"'),
    ('act(%x) {fn="relu", limit=0.0}', OPERANDS, "MOEC102", "limit=0.0 must be above 0"),
    (
        'act(%x) {fn="relu", clamp_after=true}',
        OPERANDS,
        "MOEC106",
        "clamp_after=true needs limit, the value to clamp to",
    ),
    ('glu(%order) {fn="silu"}', OPERANDS, "MOEC104", "gate must hold floating point numbers, found i32[2T]"),
    ('glu(%f0) {fn="silu", layout="concat"}', OPERANDS, "MOEC103", "gate must have at least 1 size, found f32[]"),
    (
        'glu(%x) {fn="silu"}',
        OPERANDS,
        "MOEC102",
        'layout="pair" must be one of concat, concat_up_first, interleaved, interleaved_up_first',
    ),
    ('glu(%x, %x) {fn="silu", layout="concat"}', OPERANDS, "MOEC106", 'with up, layout must be "pair", found "concat"'),
    (
        'glu(%x, %i1) {fn="silu"}',
        OPERANDS,
        "MOEC104",
        "up is i32[T] but gate is f32[T, 64]: they must hold the same type",
    ),
    ('glu(%x, %f1) {fn="silu"}', OPERANDS, "MOEC105", "up must be [T, 64] like gate f32[T, 64], found f32[T]"),
    (
        'glu(%h) {fn="silu", layout="concat"}',
        "h: f32[T, 95]",
        "MOEC105",
        "gate must have an even number of columns for gate and up, found f32[T, 95]",
    ),
]
