"""Passes keep what a layer computes, or change it exactly as they say: all against the reference back end.

T tokens, K choices, E experts, C capacity.
"""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.ir import Builder, QuantizeWeight, Region, Tensor, Weight, parse
from moec.passes import PlanCapacity
from moec.pipeline import run
from tests.passes.layers import CLAMPED, dense_layer, mixtral_layer
from tests.passes.meaning import Inputs, error, execute, in_whole_numbers, random_inputs, random_weights
from tests.passes.random_layers import LAYOUTS, layers, moe_layers, untidy_layers

TOKENS = st.sampled_from([0, 1, 2, 7, 40])
EXACT = ["canonicalize", "merge-gate-up", "fuse-experts", "fuse-experts{partial=false}", "place-experts{devices=2}"]
# A product of up to 10 numbers in fp32, in another order.
BAR = 2e-6


@given(untidy_layers, st.lists(st.sampled_from(EXACT), min_size=1, max_size=4), TOKENS, st.booleans(), st.booleans())
@settings(max_examples=150)
def test_exact_passes_keep_the_result(
    region: Region, passes: list[str], tokens: int, hot: bool, strangers: bool
) -> None:
    after = region
    for text in passes:
        after, _ = run(after, text)
    weights = random_weights(region)
    inputs = random_inputs(region, tokens, hot=hot, strangers=strangers)
    (expected,), (found,) = execute(region, weights, inputs), execute(after, weights, inputs)
    assert found.shape == expected.shape
    assert error(found, expected) <= BAR, f"{region}\n{after}"


@given(untidy_layers, TOKENS)
@settings(max_examples=50)
def test_canonicalize_keeps_every_bit(region: Region, tokens: int) -> None:
    after, _ = run(region, "canonicalize")
    weights, inputs = random_weights(region), random_inputs(region, tokens)
    assert torch.equal(execute(after, weights, inputs)[0], execute(region, weights, inputs)[0])


@given(moe_layers(functions=("identity", "relu", "relu2")), st.data(), TOKENS, st.booleans(), st.booleans())
@settings(max_examples=80)
def test_placement_keeps_every_bit(
    region: Region, data: st.DataObject, tokens: int, capacity: bool, strangers: bool
) -> None:
    """Any widths, in whole numbers: a BLAS may give a row that is not aligned other last bits at another place."""
    if capacity:
        region, _ = run(region, "plan-capacity{tokens=5,factor=0.7,multiple=1}")
    num_experts = next(kind.shape[0].constant for kind in region.weights.values() if kind.rank == 3)
    assert num_experts is not None
    owners = data.draw(st.lists(st.integers(0, 2), min_size=num_experts, max_size=num_experts))
    after, (log,) = run(region, f"place-experts{{devices=3,owners=[{','.join(map(str, owners))}]}}")
    assert len(log.done) == 1
    inputs = random_inputs(region, tokens, hot=True, strangers=strangers)
    assert inputs.weights is not None
    whole = Inputs(inputs.x.round(), inputs.experts, inputs.weights.round())
    weights = in_whole_numbers(random_weights(region))
    (expected,), (found,) = execute(region, weights, whole), execute(after, weights, whole)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fn", ["silu", "gelu", "sigmoid"])
def test_placement_keeps_every_bit_of_aligned_rows(layout: str, fn: str) -> None:
    region = mixtral_layer("moe", e=5, k=2, d=32, f=48, bias=True, layout=layout, fn=fn)
    after, _ = run(region, "place-experts{devices=3}")
    weights, inputs = random_weights(region), random_inputs(region, 37, hot=True, strangers=True)
    assert torch.equal(execute(after, weights, inputs)[0], execute(region, weights, inputs)[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("passes", ["fuse-experts", "merge-gate-up,fuse-experts", "plan-capacity,fuse-experts"])
def test_bf16_is_as_close_to_fp32_as_before(layout: str, passes: str) -> None:
    """By the ops' meanings: what a faster way may round is between it and the model's own code (tests/backends/cpu)."""
    activation = CLAMPED if layout != "none" else {"fn": "gelu"}
    regions = [
        mixtral_layer("moe", e=4, k=2, d=64, f=32, dtype=dtype, bias=True, layout=layout, **activation)
        for dtype in ("bf16", "f32")
    ]
    weights, inputs = random_weights(regions[0]), random_inputs(regions[0], 50)
    wide = {ref: tensor.float() for ref, tensor in weights.items()}
    wide_inputs = Inputs(inputs.x.float(), inputs.experts, inputs.weights)
    (exact,) = execute(run(regions[1], passes)[0], wide, wide_inputs, by_meaning=True)
    (before,) = execute(regions[0], weights, inputs, by_meaning=True)
    (after,) = execute(run(regions[0], passes)[0], weights, inputs, by_meaning=True)
    if "plan-capacity" not in passes:
        assert error(after, exact) <= 1.5 * error(before, exact)
    assert error(after, exact) <= 1e-2


# int8


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 9), st.sampled_from([1e-30, 1e-3, 1.0, 1e20]))
@settings(max_examples=50)
def test_each_weight_is_within_half_a_step(e: int, n: int, c: int, size: float) -> None:
    b = Builder("weights")
    b.input("x", Tensor.of("f32", "T", 1))
    q_and_scale = b.add_many(QuantizeWeight(b.add(Weight(ref="w", type=Tensor.of("f32", e, n, c)))), ("q", "scale"))
    region = b.build(*q_and_scale)
    weights = {ref: tensor * size for ref, tensor in random_weights(region).items()}
    q, scale = execute(region, weights, Inputs(torch.zeros(1, 1)))
    w = weights["w"].double()
    assert q.dtype == torch.int8
    assert scale.shape == (e, n)
    assert int(q.abs().max()) <= 127
    off = (w - q.double() * scale.double()[..., None]).abs()
    # fp32 division and rounding of scale leave a few units in the last place.
    assert bool((off <= scale.double()[..., None] / 2 * (1 + 1e-4)).all())
    assert bool((q[:, -1] == 0).all())  # the row of zeros
    assert bool((scale > 0).all())


@given(
    layers, TOKENS, st.sampled_from(["", "fuse-experts", "merge-gate-up", "merge-gate-up,fuse-experts"]), st.booleans()
)
@settings(max_examples=80)
def test_int8_is_the_layer_with_rounded_weights(region: Region, tokens: int, others: str, first: bool) -> None:
    """Quantised before or after other passes: what runs is q * scale, made here by hand."""
    after = region
    for text in ("quantize-experts", others) if first else (others, "quantize-experts"):
        after, _ = run(after, text)
    weights, inputs = random_weights(region), random_inputs(region, tokens)
    rounded = {ref: w if ref.endswith("_bias") else round_to_int8(w) for ref, w in weights.items()}
    (expected,), (found,) = execute(region, rounded, inputs), execute(after, weights, inputs)
    assert error(found, expected) <= 2 * BAR, f"{after}"


def round_to_int8(w: torch.Tensor) -> torch.Tensor:
    scale = w.abs().amax(dim=-1, keepdim=True) / 127
    scale = torch.where(scale == 0, 1.0, scale)
    return (w / scale).round().clamp(-127, 127) * scale


def test_int8_causes_an_error_that_is_small_and_not_zero() -> None:
    region = mixtral_layer("moe", e=4, k=2, d=64, f=32)
    weights, inputs = random_weights(region), random_inputs(region, 64)
    (expected,) = execute(region, weights, inputs)
    (found,) = execute(run(region, "quantize-experts")[0], weights, inputs)
    assert 1e-4 < error(found, expected) < 2e-2


# capacity


def kept_slots(experts: torch.Tensor, num_experts: int, capacity: int, sequence: int | None) -> torch.Tensor:
    """Which slots keep their place: token by token, choice by choice, while there is room."""
    kept = torch.zeros(experts.shape, dtype=torch.bool)
    taken: dict[tuple[int, int], int] = {}
    for token in range(experts.shape[0]):
        for choice in range(experts.shape[1]):
            expert = int(experts[token, choice])
            if expert >= num_experts:
                continue
            place = (0 if sequence is None else token // sequence, expert)
            taken[place] = taken.get(place, 0) + 1
            kept[token, choice] = taken[place] <= capacity
    return kept


@given(
    moe_layers(),
    st.sampled_from([1, 3, 8, 40]),
    st.sampled_from([1, 2, 5, 8, None]),
    st.sampled_from(["batch", "sequence"]),
    st.sampled_from([0.25, 0.5, 1.0, 1.25]),
    st.sampled_from([1, 2, 16]),
    st.sampled_from(["", "fuse-experts", "place-experts{devices=2}", "merge-gate-up"]),
)
@settings(max_examples=120)
def test_capacity_drops_later_slots(
    region: Region, tokens: int, planned: int | None, scope: str, factor: float, multiple: int, behind: str
) -> None:
    """Dropping a slot is giving it the weight 0 in the layer that drops nothing."""
    if scope == "sequence" and planned is None:
        planned = 4
    plan = PlanCapacity(tokens=planned, factor=factor, multiple=multiple, scope=scope)  # type: ignore[arg-type]
    after, _ = run(run(region, [plan])[0], behind)
    weights, inputs = random_weights(region), random_inputs(region, tokens, hot=True, strangers=tokens == 8)
    num_experts = next(w.shape[0] for w in weights.values() if w.ndim == 3)
    assert inputs.experts is not None
    assert inputs.weights is not None
    least = math.ceil(Fraction((planned or tokens) * inputs.experts.shape[1], num_experts) * Fraction(str(factor)))
    capacity = math.ceil(Fraction(least, multiple)) * multiple
    kept = kept_slots(inputs.experts, num_experts, capacity, planned if scope == "sequence" else None)
    expected = execute(region, weights, Inputs(inputs.x, inputs.experts, inputs.weights * kept))
    assert error(execute(after, weights, inputs)[0], expected[0]) <= BAR, f"{after}"


def test_some_slots_are_dropped_and_scope_decides_which() -> None:
    """The test above would pass if nothing were ever dropped."""
    region = mixtral_layer("moe", e=4, k=2, d=8, f=16)
    weights, inputs = random_weights(region), random_inputs(region, 40, hot=True)
    plans = [
        PlanCapacity(tokens=40, factor=1.0, multiple=1),
        PlanCapacity(tokens=8, factor=1.0, multiple=1, scope="sequence"),
    ]
    found = [execute(run(region, passes)[0], weights, inputs)[0] for passes in ([], plans[:1], plans[1:])]
    assert error(found[1], found[0]) > 0.05
    assert error(found[2], found[0]) > 0.05
    assert error(found[2], found[1]) > 0.05


def test_capacity_of_no_tokens() -> None:
    region = mixtral_layer("moe", e=4, k=2, d=8, f=16)
    for passes in ("plan-capacity", "plan-capacity,fuse-experts", "plan-capacity,place-experts{devices=2}"):
        (y,) = execute(run(region, passes)[0], random_weights(region), random_inputs(region, 0))
        assert y.shape == (0, 8)


def test_capacity_above_all_slots_changes_nothing() -> None:
    region = mixtral_layer("moe", e=4, k=2, d=8, f=16)
    weights, inputs = random_weights(region), random_inputs(region, 40, hot=True)
    after, _ = run(region, "plan-capacity{factor=4.0}")
    assert torch.equal(execute(after, weights, inputs)[0], execute(region, weights, inputs)[0])


def test_a_dense_ffn_of_more_axes() -> None:
    """dense_ffn takes x[..., D]; here batch and sequence stay apart."""
    flat = dense_layer("ffn", d=8, f=16, bias=True)
    region = _with_batch(flat)
    weights = random_weights(region)
    x = torch.randn(3, 5, 8)
    fused, (log,) = run(region, "fuse-experts")
    assert len(log.done) == 1
    (expected,), (found,) = execute(region, weights, Inputs(x)), execute(fused, weights, Inputs(x))
    assert found.shape == (3, 5, 8)
    assert error(found, expected) <= BAR
    assert error(found.reshape(15, 8), execute(flat, weights, Inputs(x.reshape(15, 8)))[0]) <= BAR


def _with_batch(region: Region) -> Region:
    return parse(str(region).replace("[T, ", "[B, S, "))
