"""Whole layers of every kind against a few lines of Python: expert choice, Soft MoE, capacity, devices, Norms.

T tokens, E experts, C places of an expert, D model width.
"""

from __future__ import annotations

import threading

import pytest
import torch

from moec.backends.reference.table import MEANINGS
from moec.ir import OPS, Weight, parse
from tests.backends.live import PLACED, QUANTIZED, UNFUSED, inputs, layer, near
from tests.backends.oracle_numbers import same_bits
from tests.backends.oracle_routing import group, kept_slots
from tests.backends.running import Weights, build
from tests.backends.shapes import some


def test_each_op_has_a_meaning() -> None:
    """An op that enters the op table needs one; nothing else may have one."""
    assert set(MEANINGS) | {Weight} == set(OPS.values())


def test_expert_choice() -> None:
    text = """\
region choice(%x: f32[T, 6], %logits: f32[T, 4]) {
  %weights, %tokens = route_experts(%logits) {capacity=ceildiv(T, 2)}
  %order, %offsets = group(%tokens) {experts=4, by="expert"}
  %rows = gather(%x, %order) {k=1}
  %w = weight {ref="w"} : f32[4, 6, 6]
  %h = grouped_linear(%rows, %offsets, %w)
  %y = combine(%h, %order, %weights) {by="expert", tokens=T}
  return %y
}"""
    bank = some(4, 6, 6)
    executable = build(parse(text), Weights().stacked("w", bank))
    for tokens in (0, 1, 2, 7):
        x, logits = some(tokens, 6), some(tokens, 4)
        scores = logits.softmax(1)
        expected = torch.zeros(tokens, 6)
        for e in range(4):
            for t in scores[:, e].argsort(descending=True)[: -(-tokens // 2)].tolist():
                expected[t] += scores[t, e] * (bank[e] @ x[t])
        if tokens == 0:
            # No size that is an attribute may be 0; a layer without tokens has nothing to do.
            expected = torch.zeros(0, 6)
        (y,) = executable(x, logits)
        assert y.shape == expected.shape
        assert near(y, expected) or tokens == 0


def test_soft_moe() -> None:
    text = """\
region soft(%x: f32[T, 6], %logits: f32[T, 3, 2]) {
  %rows, %offsets = dispatch_dense(%x, %logits) {softmax=true}
  %w = weight {ref="w"} : f32[3, 6, 6]
  %h = grouped_linear(%rows, %offsets, %w)
  %a = act(%h) {fn="gelu"}
  %y = combine_dense(%a, %logits) {softmax=true}
  return %y
}"""
    bank = some(3, 6, 6)
    x, logits = some(5, 6), some(5, 3, 2)
    (y,) = build(parse(text), Weights().stacked("w", bank))(x, logits)
    mixed = torch.einsum("tec,td->ecd", logits.softmax(0), x)
    done = torch.nn.functional.gelu(torch.einsum("ecd,end->ecn", mixed, bank))
    assert near(y, torch.einsum("tec,ecd->td", logits.flatten(1).softmax(1).view(5, 3, 2), done))


@pytest.mark.parametrize("capacity", [1, 2, 4])
@pytest.mark.parametrize("priority", ["token", "choice"])
def test_a_layer_that_drops(capacity: int, priority: str) -> None:
    """Dropped slots add nothing; the others compute what they would without a capacity."""
    at = f', capacity={capacity}, priority="{priority}"'
    text = UNFUSED.replace("{experts=4}", "{experts=4" + at + "}")
    x, ids, factors = inputs(11)
    weights = layer()
    (y,) = build(parse(text), weights)(x, ids, factors)
    kept = kept_slots(ids.tolist(), 4, capacity, priority=priority)
    assert len(kept) < ids.numel()
    masked = torch.tensor([[t * 2 + j in kept for j in range(2)] for t in range(11)])
    (expected,) = build(parse(UNFUSED), weights)(x, ids.masked_fill(~masked, -1), factors)
    assert same_bits(y, expected)
    assert group(ids.tolist(), 4, kept)[1][-1] == len(kept)


def test_placed_experts_give_the_same_bits() -> None:
    weights = layer()
    assert same_bits(build(parse(PLACED), weights)(*inputs())[0], build(parse(UNFUSED), weights)(*inputs())[0])


def test_int8_is_near() -> None:
    weights = layer()
    (exact,) = build(parse(UNFUSED), weights)(*inputs())
    (y,) = build(parse(QUANTIZED), weights)(*inputs())
    assert 0 < (y - exact).norm() / exact.norm() < 0.02


def test_weights_with_letters() -> None:
    """Sizes of weights may be letters, which the weights then bind."""
    text = """\
region letters(%x: f32[T, D], %ids: i32[T, K], %weights: f32[T, K]) {
  %w_in = weight {ref="gate"} : f32[4, F, D]
  %w_out = weight {ref="down"} : f32[4, D, F]
  %y = expert_ffn(%x, %ids, %weights, %w_in, %w_out) {fn="relu", layout="none"}
  return %y
}"""
    fixed = text.replace("F", "5").replace("D", "6").replace("[T, K]", "[T, 2]")
    assert near(build(parse(text), layer())(*inputs())[0], build(parse(fixed), layer())(*inputs())[0])
    quantized = text.replace("%w_out = ", "%q, %s = quantize_weight(%w_in)\n  %w_out = ").replace(
        "%w_in, %w_out)", "%q, %w_out, scale_in=%s)"
    )
    executable = build(parse(quantized), layer())
    assert "a copy of 200 bytes" in executable.describe()
    assert executable(*inputs())[0].isfinite().all()


def test_constants_and_shared_experts() -> None:
    text = """\
region shared(%x: f32[T, 6], %gate: f32[T, 1]) {
  %two = constant {value=2.0} : f32[T, 1]
  %factor = mul(%gate, %two)
  %y = mul(%x, %factor)
  %z = add(%y, %x)
  return %z
}"""
    x, gate = some(3, 6), some(3, 1)
    (z,) = build(parse(text), Weights())(x, gate)
    assert same_bits(z, x * (gate * 2) + x)


@pytest.mark.parametrize("text", [UNFUSED, QUANTIZED], ids=["plain", "quantized"])
def test_threads_do_not_disturb_each_other(text: str) -> None:
    """Several calls at once, right behind a write that makes the copies stale."""
    weights = layer()
    executable = build(parse(text), weights)
    calls = [inputs(tokens) for tokens in range(1, 9)]
    for param in weights.module.parameters():
        param.mul_(1.5)
    fresh = build(parse(text), weights)
    expected = [fresh(*call)[0] for call in calls]
    found: list[list[torch.Tensor]] = [[] for _ in calls]
    start = threading.Barrier(len(calls))

    def work(number: int) -> None:
        start.wait()
        for _ in range(5):
            found[number] += executable(*calls[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, wanted in zip(found, expected, strict=True):
        assert len(results) == 5
        assert all(same_bits(result, wanted) for result in results)


def test_a_region_may_return_inputs_weights_and_joined_weights() -> None:
    text = """\
region odd(%x: f32[T, 6]) {
  %w = weight {ref="w"} : f32[3, 2, 6]
  %v = weight {ref="v"} : f32[3, 2, 6]
  %both = concat_weights(%w, %v) {axis=1}
  %some = select_experts(%both) {experts=[2, 0, 2]}
  %q, %s = quantize_weight(%w)
  return %x, %w, %both, %some, %q
}"""
    w, v, x = some(3, 2, 6), some(3, 2, 6), some(4, 6)
    for pack in (False, True):
        executable = build(parse(text), Weights().stacked("w", w).separate("v", v), pack=pack)
        found = executable(x)
        joined = torch.cat([w, v], 1)
        for a, b in zip(found[:4], (x, w, joined, joined[[2, 0, 2]]), strict=True):
            assert same_bits(a, b)
        assert found[4].dtype == torch.int8
