"""quantize-experts: what it covers, what it leaves alone and why."""

from __future__ import annotations

import pytest

from moec.ir import QuantizeWeight, Region, parse
from moec.passes import QuantizeExperts
from moec.pipeline import run
from tests.passes.layers import dense_layer, mixtral_layer, shared_expert_layer
from tests.passes.variant import variant

LAYER = mixtral_layer("moe", e=4, k=2, d=8, f=16)
PAIR = mixtral_layer("moe", e=4, k=2, d=8, f=16, layout="pair", bias=True)
DENSE = dense_layer("ffn", d=8, f=16)

ROUTER_MLP = parse(
    """region router(%x: f32[T, 8]) {
  %w1 = weight {ref="first"} : f32[8, 8]
  %h = linear(%x, %w1) : f32[T, 8]
  %a = act(%h) {fn="tanh"} : f32[T, 8]
  %w2 = weight {ref="second"} : f32[4, 8]
  %logits = linear(%a, %w2) : f32[T, 4]
  %chosen, %scores = opaque(%logits) {graph="top_k"} : i32[T, 2], f32[T, 2]
  %order, %offsets = group(%chosen) {experts=4} : i32[2T], i32[5]
  %rows = gather(%x, %order) {k=2} : f32[2T, 8]
  %y = combine(%rows, %order, %scores) : f32[T, 8]
  return %y
}"""
)

SKIPPED: dict[str, tuple[Region, list[str]]] = {
    "int8 already": (
        run(DENSE, "quantize-experts")[0],
        ["%w_gate_up_q: it is int8 already", "%w_down_q: it is int8 already"],
    ),
    "router and shared gate": (
        shared_expert_layer(),
        ["%w_router: %logits takes part in routing", "%w_shared_gate: %logit is a linear outside an FFN"],
    ),
    "a router of two layers, through an opaque op": (
        ROUTER_MLP,
        ["%w1: %h takes part in routing", "%w2: %logits takes part in routing"],
    ),
    "a projection": (
        parse(
            """region project(%x: f32[T, 8]) {
  %w = weight {ref="w"} : f32[4, 8]
  %y = linear(%x, %w) : f32[T, 4]
  return %y
}"""
        ),
        ["%w: %y is a linear outside an FFN"],
    ),
    "not a weight": (
        variant(
            DENSE,
            ("(%x: f32[T, 8])", "(%x: f32[T, 8], %w: f32[8, 16])"),
            ('  %w_down = weight {ref="down"} : f32[8, 16]\n', ""),
            ("%w_down", "%w"),
        ),
        ["%w: it comes from the region's inputs and is no weight"],
    ),
    "a function of an input": (
        variant(
            DENSE,
            ("(%x: f32[T, 8])", "(%x: f32[T, 8], %w: f32[8, 8])"),
            ('%w_down = weight {ref="down"}', "%w_down = concat_weights(%w, %w) {axis=1}"),
        ),
        ["%w_down: it comes from concat_weights and is no weight"],
    ),
    "a weight of unknown size": (
        variant(
            DENSE, ("f32[32, 8]", "f32[2F, 8]"), ("T, 32", "T, 2F"), ("T, 16", "T, F"), ("f32[8, 16]", "f32[8, F]")
        ),
        ["%w_gate_up: its size f32[2F, 8] is not known", "%w_down: its size f32[8, F] is not known"],
    ),
}


@pytest.mark.parametrize("case", SKIPPED)
def test_says_why(case: str) -> None:
    region, reasons = SKIPPED[case]
    _, (log,) = run(region, [QuantizeExperts()])
    assert log.skipped == reasons


@pytest.mark.parametrize(
    "before", ["", "fuse-experts", "merge-gate-up", "plan-capacity,fuse-experts", "place-experts{devices=2}"]
)
@pytest.mark.parametrize("layout", ["pair", "concat", "none"])
def test_covers_every_matrix_of_an_expert_in_every_form(before: str, layout: str) -> None:
    layer = mixtral_layer("moe", e=4, k=2, d=8, f=16, layout=layout, bias=True)
    after, logs = run(run(layer, before)[0], "quantize-experts")
    first = {"pair": 32, "concat": 32, "none": 16}[layout]
    assert logs[-1].skipped == []
    assert logs[-1].numbers == {
        "bytes_total": 4 * 4 * (first * 8 + 8 * 16 + first + 8),
        "bytes_covered": 4 * 4 * (first * 8 + 8 * 16),
        "bytes_after": 4 * (first * 8 + 8 * 16) + 4 * 4 * 2 * (first + 8),
    }
    read = {value.type.dtype for node in after.nodes if not node.op.of_weights for value in node.op.operands}
    assert {"i8", "f32"} <= read
    matrices = [
        v for n in after.nodes if not n.op.of_weights for name, v in n.op.named_operands if name.startswith("w_")
    ]
    assert all(value.type.dtype == "i8" for value in matrices)


def test_one_scale_per_output_channel_of_each_expert() -> None:
    after, _ = run(LAYER, [QuantizeExperts()])
    scales = {str(node.results[1].type) for node in after.nodes if isinstance(node.op, QuantizeWeight)}
    assert scales == {"f32[4, 32]", "f32[4, 8]"}


def test_a_weight_used_twice_is_quantised_once() -> None:
    tied = variant(PAIR, ("%rows, %offsets, %w_up,", "%rows, %offsets, %w_gate,"))
    after, (log,) = run(tied, [QuantizeExperts()])
    assert sum(isinstance(node.op, QuantizeWeight) for node in after.nodes) == 2
    assert log.numbers["bytes_covered"] == 4 * 4 * 2 * 16 * 8


def test_a_weight_that_something_else_needs_too_is_still_counted() -> None:
    """%w2 is a matrix of the router and of an FFN: the router's copy stays, and the bytes say so."""
    tied = variant(
        ROUTER_MLP,
        (
            "  return %y",
            """  %b = linear(%a, %w2) : f32[T, 4]
  %c = act(%b) {fn="relu"} : f32[T, 4]
  %w3 = weight {ref="w3"} : f32[8, 4]
  %z = linear(%c, %w3) : f32[T, 8]
  return %y, %z""",
        ),
    )
    _, (log,) = run(tied, [QuantizeExperts()])
    assert log.skipped == ["%w1: %h takes part in routing", "%w2: %logits takes part in routing"]
    assert log.numbers == {
        "bytes_total": 4 * (64 + 32 + 32),
        "bytes_covered": 4 * (32 + 32),
        "bytes_after": 4 * (64 + 32) + (32 + 32) + 4 * (4 + 8),
    }


def test_a_16_bit_layer_keeps_its_type() -> None:
    after, _ = run(mixtral_layer("moe", e=4, k=2, d=8, f=16, dtype="bf16"), [QuantizeExperts()])
    assert [str(value.type) for value in after.outputs] == ["bf16[T, 8]"]
