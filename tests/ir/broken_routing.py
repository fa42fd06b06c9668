"""Broken type rules of routing, grouping and exchange: line, operands, code and message."""

from __future__ import annotations

OPERANDS = (
    "x: f32[T, 64], experts: i32[T, 2], weights: f32[T, 2], order: i32[2T], offsets: i32[9], rows: f32[2T, 64], "
    "f3: f32[T, 2, 64], f1: f32[T], f0: f32[], i1: i32[T], b2: bool[T, 64], w: f32[8, 96, 64]"
)

BROKEN = [
    # route
    ("route(%f3) {k=2}", OPERANDS, "MOEC103", "logits must have 2 sizes, found f32[T, 2, 64]"),
    ("route(%experts) {k=2}", OPERANDS, "MOEC104", "logits must hold floating point numbers, found i32[T, 2]"),
    ("route(%x) {k=65}", OPERANDS, "MOEC102", "k=65 must be in 1..64"),
    ("route(%x) {k=0}", OPERANDS, "MOEC102", "k=0 must be in 1..64"),
    (
        'route(%x) {k=2, score="softmox"}',
        OPERANDS,
        "MOEC102",
        'score="softmox" must be one of softmax, softmax_chosen, sigmoid, sqrt_softplus, identity',
    ),
    ('route(%x, bias=%f1) {k=2, bias_on="x"}', OPERANDS, "MOEC102", 'bias_on="x" must be one of scores, logits'),
    ('route(%x) {k=2, bias_on="logits"}', OPERANDS, "MOEC106", 'bias_on="logits" needs bias'),
    ("route(%x, bias=%i1) {k=2}", OPERANDS, "MOEC104", "bias must hold floating point numbers, found i32[T]"),
    ("route(%x, bias=%f1) {k=2}", OPERANDS, "MOEC105", "bias must be [64] for logits f32[T, 64], found f32[T]"),
    ("route(%x, noise=%i1) {k=2}", OPERANDS, "MOEC104", "noise must hold floating point numbers, found i32[T]"),
    ("route(%x, noise=%f1) {k=2}", OPERANDS, "MOEC105", "noise must be [T, 64] like logits, found f32[T]"),
    ("route(%x) {k=2, groups=0}", OPERANDS, "MOEC102", "groups=0 must be at least 1"),
    ("route(%x) {k=2, groups=7}", OPERANDS, "MOEC102", "groups=7 must divide the 64 experts"),
    ("route(%x) {k=2, groups=4, kept_groups=5}", OPERANDS, "MOEC102", "kept_groups=5 must be in 1..4"),
    ('route(%x) {k=2, group_score="sum"}', OPERANDS, "MOEC102", 'group_score="sum" must be one of max, top2'),
    ('route(%x) {k=2, group_fill="one"}', OPERANDS, "MOEC102", 'group_fill="one" must be one of minus_inf, zero'),
    (
        "route(%x) {k=17, groups=4}",
        OPERANDS,
        "MOEC102",
        "k=17 must be at most 16, the experts of 1 of 4 groups",
    ),
    (
        'route(%x) {k=2, normalize="l1"}',
        OPERANDS,
        "MOEC102",
        'normalize="l1" must be one of none, sum, clamped_sum, norm',
    ),
    ('route(%x) {k=2, normalize="sum", eps=-1.0}', OPERANDS, "MOEC102", "eps=-1.0 must be at least 0"),
    ("route(%x) {k=2, eps=1.0}", OPERANDS, "MOEC106", 'eps=1.0 goes with normalize="sum" or "clamped_sum"'),
    ('route(%x) {k=2, normalize="norm", p=0.0}', OPERANDS, "MOEC102", "p=0.0 must be above 0"),
    ("route(%x) {k=2, p=2.0}", OPERANDS, "MOEC106", 'p=2.0 goes with normalize="norm"'),
    # route_experts
    ("route_experts(%f1) {capacity=4}", OPERANDS, "MOEC103", "logits must have 2 sizes, found f32[T]"),
    (
        "route_experts(%experts) {capacity=4}",
        OPERANDS,
        "MOEC104",
        "logits must hold floating point numbers, found i32[T, 2]",
    ),
    ("route_experts(%x) {capacity=0}", OPERANDS, "MOEC102", "capacity=0 must be at least 1"),
    (
        'route_experts(%x) {capacity=4, score="max"}',
        OPERANDS,
        "MOEC102",
        'score="max" must be one of softmax, softmax_tokens, sigmoid, identity',
    ),
    # group
    ("group(%x) {experts=8}", OPERANDS, "MOEC104", "ids must hold i32 or i64, found f32[T, 64]"),
    ("group(%order) {experts=8}", OPERANDS, "MOEC103", "ids must have 2 sizes, found i32[2T]"),
    ("group(%experts) {experts=0}", OPERANDS, "MOEC102", "experts=0 must be at least 1"),
    ('group(%experts) {experts=8, by="row"}', OPERANDS, "MOEC102", 'by="row" must be one of token, expert'),
    (
        'group(%experts) {experts=8, by="expert"}',
        OPERANDS,
        "MOEC105",
        'the first size of ids must be 8 with by="expert", found T',
    ),
    (
        'group(%experts) {experts=8, capacity=4, policy="arival"}',
        OPERANDS,
        "MOEC102",
        'policy="arival" must be one of arrival, weight, token_weight',
    ),
    (
        'group(%experts) {experts=8, capacity=4, priority="slot"}',
        OPERANDS,
        "MOEC102",
        'priority="slot" must be one of token, choice',
    ),
    (
        'group(%experts) {experts=8, capacity=4, scope="row"}',
        OPERANDS,
        "MOEC102",
        'scope="row" must be one of batch, sequence',
    ),
    (
        'group(%experts) {experts=8, priority="choice"}',
        OPERANDS,
        "MOEC106",
        "policy, priority and scope say which slots to drop: they need capacity",
    ),
    (
        'group(%ids) {experts=8, capacity=4, by="expert"}',
        "ids: i32[8, C]",
        "MOEC106",
        'capacity goes with by="token": with by="expert" ids has it',
    ),
    ("group(%experts) {experts=8, capacity=-1}", OPERANDS, "MOEC102", "capacity=-1 must be at least 1"),
    (
        'group(%experts) {experts=8, capacity=4, scope="sequence"}',
        OPERANDS,
        "MOEC106",
        'sequence, the tokens of one sequence, goes with scope="sequence" and only with it',
    ),
    (
        'group(%experts) {experts=8, capacity=4, scope="sequence", sequence=0}',
        OPERANDS,
        "MOEC102",
        "sequence=0 must be at least 1",
    ),
    (
        'group(%experts) {experts=8, capacity=4, policy="weight"}',
        OPERANDS,
        "MOEC106",
        'policy="weight" needs weights',
    ),
    ("group(%experts, %weights) {experts=8}", OPERANDS, "MOEC106", 'policy="arrival" takes no weights'),
    (
        'group(%experts, %experts) {experts=8, capacity=4, policy="weight"}',
        OPERANDS,
        "MOEC104",
        "weights must hold floating point numbers, found i32[T, 2]",
    ),
    (
        'group(%experts, %x) {experts=8, capacity=4, policy="token_weight"}',
        OPERANDS,
        "MOEC105",
        "weights must be [T, 2] like ids i32[T, 2], found f32[T, 64]",
    ),
    # gather
    ("gather(%f1, %order) {k=2}", OPERANDS, "MOEC103", "x must have 2 sizes, found f32[T]"),
    ("gather(%x, %f1) {k=2}", OPERANDS, "MOEC104", "order must hold i32 or i64, found f32[T]"),
    ("gather(%x, %experts) {k=2}", OPERANDS, "MOEC103", "order must have 1 size, found i32[T, 2]"),
    ("gather(%x, %order) {k=0}", OPERANDS, "MOEC102", "k=0 must be at least 1"),
    # exchange
    ("exchange(%f1, %offsets) {owners=[0], devices=1}", OPERANDS, "MOEC103", "rows must have 2 sizes, found f32[T]"),
    ("exchange(%rows, %offsets) {owners=[0], devices=0}", OPERANDS, "MOEC102", "devices=0 must be at least 1"),
    (
        "exchange(%rows, %offsets) {owners=[], devices=1}",
        OPERANDS,
        "MOEC102",
        "owners must name a device for each expert",
    ),
    ("exchange(%rows, %offsets) {owners=[0, 2], devices=2}", OPERANDS, "MOEC102", "expert 1's owner 2 must be in 0..1"),
    (
        "exchange(%rows, %offsets) {owners=[0, 1], devices=2}",
        OPERANDS,
        "MOEC105",
        "offsets must be [3] for 2 owners, found i32[9]",
    ),
    (
        "exchange(%rows, %f1) {owners=[0, 1], devices=2}",
        OPERANDS,
        "MOEC104",
        "offsets must hold i32 or i64, found f32[T]",
    ),
    (
        "exchange(%rows, %experts) {owners=[0, 1], devices=2}",
        OPERANDS,
        "MOEC103",
        "offsets must have 1 size, found i32[T, 2]",
    ),
]
