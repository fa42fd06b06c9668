"""Broken type rules of combining, norms, weights and the rest: line, operands, code and message."""

from __future__ import annotations

OPERANDS = (
    "x: f32[T, 64], experts: i32[T, 2], weights: f32[T, 2], order: i32[2T], offsets: i32[9], rows: f32[2T, 64], "
    "f3: f32[T, 2, 64], f1: f32[T], f0: f32[], i1: i32[T], b2: bool[T, 64], w: f32[8, 96, 64]"
)

BROKEN = [
    # combine and friends
    ('combine(%rows, %order, %weights) {by="x"}', OPERANDS, "MOEC102", 'by="x" must be one of token, expert'),
    ("combine(%f1, %order, %weights)", OPERANDS, "MOEC103", "rows must have 2 sizes, found f32[T]"),
    ("combine(%b2, %order, %weights)", OPERANDS, "MOEC104", "rows must hold floating point numbers, found bool[T, 64]"),
    ("combine(%rows, %f1, %weights)", OPERANDS, "MOEC104", "order must hold i32 or i64, found f32[T]"),
    ("combine(%rows, %experts, %weights)", OPERANDS, "MOEC103", "order must have 1 size, found i32[T, 2]"),
    ("combine(%rows, %order, %f1)", OPERANDS, "MOEC103", "weights must have 2 sizes, found f32[T]"),
    (
        "combine(%rows, %order, %experts)",
        OPERANDS,
        "MOEC104",
        "weights must hold floating point numbers, found i32[T, 2]",
    ),
    (
        "combine(%rows, %offsets, %weights)",
        OPERANDS,
        "MOEC105",
        "the size of order must be 2T like the rows of f32[2T, 64], found 9",
    ),
    (
        "combine(%rows, %order, %x)",
        OPERANDS,
        "MOEC105",
        "the number of weights in f32[T, 64] must be 2T like the rows of f32[2T, 64], found 64T",
    ),
    (
        "combine(%rows, %order, %weights) {tokens=T}",
        OPERANDS,
        "MOEC106",
        'tokens, the number of tokens, goes with by="expert" and only with it',
    ),
    (
        'combine(%rows, %order, %weights) {by="expert"}',
        OPERANDS,
        "MOEC106",
        'tokens, the number of tokens, goes with by="expert" and only with it',
    ),
    ('scale_rows(%rows, %order, %weights) {by="x"}', OPERANDS, "MOEC102", 'by="x" must be one of token, expert'),
    ("scale_rows(%f1, %order, %weights)", OPERANDS, "MOEC103", "rows must have 2 sizes, found f32[T]"),
    (
        "identity_rows(%f1, %experts, %weights) {first=8, count=1}",
        OPERANDS,
        "MOEC103",
        "x must have 2 sizes, found f32[T]",
    ),
    (
        "identity_rows(%b2, %experts, %weights) {first=8, count=1}",
        OPERANDS,
        "MOEC104",
        "x must hold floating point numbers, found bool[T, 64]",
    ),
    (
        "identity_rows(%x, %order, %weights) {first=8, count=1}",
        OPERANDS,
        "MOEC103",
        "ids must have 2 sizes, found i32[2T]",
    ),
    (
        "identity_rows(%x, %x, %weights) {first=8, count=1}",
        OPERANDS,
        "MOEC104",
        "ids must hold i32 or i64, found f32[T, 64]",
    ),
    (
        "identity_rows(%x, %experts, %experts) {first=8, count=1}",
        OPERANDS,
        "MOEC104",
        "weights must hold floating point numbers, found i32[T, 2]",
    ),
    ("identity_rows(%x, %experts, %weights) {first=-1, count=1}", OPERANDS, "MOEC102", "first=-1 must be at least 0"),
    ("identity_rows(%x, %experts, %weights) {first=8, count=0}", OPERANDS, "MOEC102", "count=0 must be at least 1"),
    (
        "identity_rows(%x, %e, %w) {first=8, count=1}",
        "x: f32[T, 64], e: i32[S, 2], w: f32[S, 2]",
        "MOEC105",
        "the tokens of ids i32[S, 2] must be T like x f32[T, 64], found S",
    ),
    (
        "identity_rows(%x, %experts, %x) {first=8, count=1}",
        OPERANDS,
        "MOEC105",
        "weights must be [T, 2] like ids i32[T, 2], found f32[T, 64]",
    ),
    # norm
    ('norm(%order) {kind="rms", eps=0.0}', OPERANDS, "MOEC104", "x must hold floating point numbers, found i32[2T]"),
    ('norm(%x) {kind="batch", eps=0.0}', OPERANDS, "MOEC102", 'kind="batch" must be one of rms, layer, none'),
    ('norm(%x) {kind="rms", eps=-0.5}', OPERANDS, "MOEC102", "eps=-0.5 must be at least 0"),
    ('norm(%x, w=%f1) {kind="none", eps=0.5}', OPERANDS, "MOEC106", 'eps=0.5 goes with a norm, not with kind="none"'),
    ('norm(%x) {kind="none", eps=0.0}', OPERANDS, "MOEC106", 'kind="none" scales and shifts: it needs w or b'),
    ('norm(%x) {kind="rms", eps=0.0, w_shift=1.0}', OPERANDS, "MOEC106", "w_shift=1.0 is added to w: it needs w"),
    ('norm(%f0) {kind="rms", eps=0.0}', OPERANDS, "MOEC103", "x must have at least 1 size, found f32[]"),
    ('norm(%f0, w=%f1) {kind="rms", eps=0.0}', OPERANDS, "MOEC103", "x must have at least 1 size, found f32[]"),
    (
        'norm(%f3, offsets=%offsets, w=%x) {kind="rms", eps=0.0}',
        OPERANDS,
        "MOEC103",
        "x must have 2 sizes, found f32[T, 2, 64]",
    ),
    (
        'norm(%rows, offsets=%offsets) {kind="rms", eps=0.0}',
        OPERANDS,
        "MOEC106",
        "offsets go with w or b of each expert, and both are absent",
    ),
    (
        'norm(%rows, offsets=%offsets, w=%x) {kind="rms", eps=0.0}',
        OPERANDS,
        "MOEC105",
        "offsets must be [T + 1] for parameters f32[T, 64], found i32[9]",
    ),
    ('norm(%x, w=%x) {kind="rms", eps=0.0}', OPERANDS, "MOEC103", "w must have 1 size, found f32[T, 64]"),
    ('norm(%x, w=%w) {kind="rms", eps=0.0}', "x: f32[T, 64], w: f16[64]", "MOEC104", "w must hold f32, found f16[64]"),
    ('norm(%x, w=%f1) {kind="rms", eps=0.0}', OPERANDS, "MOEC105", "w must be [64] for x f32[T, 64], found f32[T]"),
    (
        'norm(%x, offsets=%o, w=%w, b=%b) {kind="rms", eps=0.0}',
        "x: f32[T, 64], o: i32[9], w: f32[8, 64], b: f32[7, 64]",
        "MOEC105",
        "b must be [8, 64] like w f32[8, 64], found f32[7, 64]",
    ),
    # dense dispatch
    ("dispatch_dense(%f1, %f3)", OPERANDS, "MOEC103", "x must have 2 sizes, found f32[T]"),
    ("dispatch_dense(%b2, %f3)", OPERANDS, "MOEC104", "x must hold floating point numbers, found bool[T, 64]"),
    ("dispatch_dense(%x, %x)", OPERANDS, "MOEC103", "weights must have 3 sizes, found f32[T, 64]"),
    (
        "dispatch_dense(%x, %i)",
        "x: f32[T, 64], i: i32[T, 8, 4]",
        "MOEC104",
        "weights must hold floating point numbers, found i32[T, 8, 4]",
    ),
    (
        "dispatch_dense(%x, %w)",
        OPERANDS,
        "MOEC105",
        "the tokens of weights f32[8, 96, 64] must be T like those of x, found 8",
    ),
    ("combine_dense(%f1, %w)", OPERANDS, "MOEC103", "rows must have 2 sizes, found f32[T]"),
    ("combine_dense(%b2, %w)", OPERANDS, "MOEC104", "rows must hold floating point numbers, found bool[T, 64]"),
    ("combine_dense(%x, %x)", OPERANDS, "MOEC103", "weights must have 3 sizes, found f32[T, 64]"),
    (
        "combine_dense(%x, %i)",
        "x: f32[T, 64], i: i32[T, 8, 4]",
        "MOEC104",
        "weights must hold floating point numbers, found i32[T, 8, 4]",
    ),
    (
        "combine_dense(%x, %w)",
        OPERANDS,
        "MOEC105",
        "the number of rows must be 6144 for weights f32[8, 96, 64], found T",
    ),
    # add, mul
    ("add(%x, %order)", OPERANDS, "MOEC104", "a is f32[T, 64] but b is i32[2T]: they must hold the same type"),
    ('pointwise(%order) {formula="a"}', OPERANDS, "MOEC104", "a must hold floating point numbers, found i32[2T]"),
    (
        'pointwise(%x, %order) {formula="a * b"}',
        OPERANDS,
        "MOEC104",
        "b is i32[2T] but a is f32[T, 64]: they must hold the same type",
    ),
    (
        'pointwise(%x, %rows) {formula="a * b"}',
        OPERANDS,
        "MOEC105",
        "b must be [T, 64] like a f32[T, 64], found f32[2T, 64]",
    ),
    (
        'pointwise(%x) {formula="a * b"}',
        OPERANDS,
        "MOEC106",
        'formula="a * b" must read a, and nothing else',
    ),
    (
        'pointwise(%x, %x) {formula="tanh(b)"}',
        OPERANDS,
        "MOEC106",
        'formula="tanh(b)" must read a and b, and nothing else',
    ),
    ("mul(%b2, %b2)", OPERANDS, "MOEC104", "a must hold numbers, found bool[T, 64]"),
    (
        "mul(%x, %rows)",
        OPERANDS,
        "MOEC105",
        "a is f32[T, 64] but b is f32[2T, 64]: sizes must be equal or 1, counted from the right",
    ),
    # weights
    ('weight {ref=""} : f32[8]', "", "MOEC102", "ref must not be empty"),
    ("constant {value=0.5} : i32[T]", "", "MOEC102", "value=0.5 must be whole for i32[T]"),
    ("constant {value=2.0} : bool[T]", "", "MOEC102", "value=2.0 must be 0 or 1 for bool[T]"),
    ("concat_weights {axis=0}", "", "MOEC106", "takes at least one weight"),
    ("concat_weights(%w) {axis=3}", OPERANDS, "MOEC102", "axis=3 must be in 0..2 for f32[8, 96, 64]"),
    ("concat_weights(%w) {axis=-1}", OPERANDS, "MOEC102", "axis=-1 must be in 0..2 for f32[8, 96, 64]"),
    (
        "concat_weights(%x, %b2) {axis=0}",
        OPERANDS,
        "MOEC104",
        "%b2 is bool[T, 64] but %x is f32[T, 64]: they must hold the same type",
    ),
    (
        "concat_weights(%x, %weights) {axis=0}",
        OPERANDS,
        "MOEC105",
        "%x is f32[T, 64] but %weights is f32[T, 2]: they must agree in all but axis 0",
    ),
    (
        "concat_weights(%x, %f1) {axis=1}",
        OPERANDS,
        "MOEC105",
        "%x is f32[T, 64] but %f1 is f32[T]: they must agree in all but axis 1",
    ),
    ("select_experts(%f0) {experts=[0]}", OPERANDS, "MOEC103", "w must have at least 1 size, found f32[]"),
    ("select_experts(%w) {experts=[]}", OPERANDS, "MOEC102", "experts must name at least one expert"),
    ("select_experts(%w) {experts=[0, 8]}", OPERANDS, "MOEC102", "expert 8 must be in 0..7"),
    ("select_experts(%w) {experts=[-1]}", "w: f32[E, 4]", "MOEC102", "expert -1 must be in 0..E-1"),
    ("quantize_weight(%f1)", OPERANDS, "MOEC103", "w must have at least 2 sizes, found f32[T]"),
    ("quantize_weight(%experts)", OPERANDS, "MOEC104", "w must hold floating point numbers, found i32[T, 2]"),
    # opaque
    ('opaque(%x) {graph=""} : f32[T]', OPERANDS, "MOEC102", "graph must not be empty"),
]
