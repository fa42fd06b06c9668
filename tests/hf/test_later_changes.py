"""Weights, dtypes and implementations that change after compiling are honoured, or refused clearly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import moec
from tests.frontend.compare import relative
from tests.hf.agreement import assert_close, assert_equal, run, told
from tests.hf.models import MIXTURES, MODELS, compiled

EVERY = pytest.mark.parametrize("name", list(MODELS))


@EVERY
def test_double_after_compile(name: str) -> None:
    """The compiled twin in float64 computes in float64."""
    _, fast = compiled(name)
    inputs = MODELS[name].inputs(2, 9, seed=1)
    want = run(MODELS[name].make().double(), inputs).logits
    with told():
        got = run(fast.double(), inputs).logits
    assert got.dtype == torch.float64
    assert_close(got, want, bar=1e-12)


@EVERY
def test_bfloat16_after_compile(name: str) -> None:
    _, fast = compiled(name)
    with told():
        assert_as_good_as_the_original(name, fast.to(torch.bfloat16))


def assert_as_good_as_the_original(name: str, fast: Any) -> None:
    """The 16-bit bar: error against a float32 evaluation of the same weights at most 1.5 times the original's own.

    Both errors are medians over batches: one flipped near-tie in a router moves a single batch far.
    """
    sixteen = MODELS[name].make(dtype=torch.bfloat16)
    exact = MODELS[name].make(dtype=torch.bfloat16).float()
    mine, own = [], []
    for seed in range(7):
        inputs = MODELS[name].inputs(3, 11, seed=30 + seed)
        reference = run(exact, inputs).logits
        got = run(fast, inputs).logits
        assert got.dtype == torch.bfloat16
        mine.append(relative(got.float(), reference)[0])
        own.append(relative(run(sixteen, inputs).logits.float(), reference)[0])
    middle = len(mine) // 2
    assert sorted(mine)[middle] <= 1.5 * sorted(own)[middle]


@EVERY
def test_compiling_a_bfloat16_model(name: str) -> None:
    model = MODELS[name].make(dtype=torch.bfloat16)
    fast = moec.compile(model, example_inputs=MODELS[name].inputs())
    kinds = [layer.kind for layer in fast.moec.report.layers if layer.status == "compiled"]
    reasons = [f"{layer.name}: {layer.reason}" for layer in fast.moec.report.layers]
    assert kinds.count("moe") == list(MODELS[name].layers.values()).count("moe"), reasons
    assert_as_good_as_the_original(name, fast)


@EVERY
def test_converting_the_original(name: str) -> None:
    """Module.to on the original swaps parameter data under the twin and replaces only its own buffers."""
    model, fast = compiled(name)
    model.to(torch.bfloat16)
    inputs = MODELS[name].inputs(3, 11, seed=2)
    refusal, got = None, torch.empty(0)
    try:
        with told():
            got = run(fast, inputs).logits
    except moec.MoecError as error:
        refusal = error
    if refusal is not None:
        assert refusal.hint
        return
    reference = run(MODELS[name].make(dtype=torch.bfloat16).float(), inputs).logits
    own = run(MODELS[name].make(dtype=torch.bfloat16), inputs).logits
    assert relative(got.float(), reference)[0] <= 2 * relative(own.float(), reference)[0] + 1e-6


@EVERY
def test_in_place_writes_are_seen(name: str) -> None:
    """Writes that raise the version counter, to either model."""
    model, fast = compiled(name)
    inputs = MODELS[name].inputs(2, 9, seed=3)
    before = run(fast, inputs).logits
    for writer in (model, fast):
        with torch.no_grad():
            for parameter in writer.parameters():
                parameter.mul_(1.1)
        with told():
            after = run(fast, inputs).logits
        assert not torch.allclose(after, before, atol=1e-4)
        assert_close(after, run(model, inputs).logits)
        before = after


@pytest.mark.parametrize("pack", [False, True], ids=["unpacked", "packed"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "switch"])
def test_writes_behind_the_back_after_refresh(name: str, pack: bool) -> None:
    """`p.data.mul_()` raises no version: noticed without packing, and after refresh with it."""
    model, fast = compiled(name, pack=pack)
    inputs = MODELS[name].inputs(2, 9, seed=4)
    for parameter in model.parameters():
        parameter.data.mul_(1.2)
    if pack:
        moec.refresh(fast)
    with told():
        assert_close(run(fast, inputs).logits, run(model, inputs).logits)


@pytest.mark.parametrize("name", MIXTURES)
def test_packed_copies_follow_load_state_dict(name: str) -> None:
    model, fast = compiled(name, pack=True)
    other = MODELS[name].make(seed=3)
    inputs = MODELS[name].inputs(2, 9, seed=5)
    assert_close(run(fast, inputs).logits, run(model, inputs).logits)
    for target in (fast, model):
        target.load_state_dict(other.state_dict())
        with told():
            assert_close(run(fast, inputs).logits, run(other, inputs).logits)
        other = MODELS[name].make(seed=4)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "switch", "bert"])
def test_assigning_a_state_dict_ends_the_sharing(name: str) -> None:
    """load_state_dict(assign=True) on the twin: its results are the new weights', and it says what happened."""
    model, fast = compiled(name)
    other = MODELS[name].make(seed=5)
    inputs = MODELS[name].inputs(2, 9, seed=6)
    kept = run(model, inputs).logits
    with told() as texts:
        fast.load_state_dict(other.state_dict(), assign=True)
        assert_close(run(fast, inputs).logits, run(other, inputs).logits)
    assert_equal(run(model, inputs).logits, kept)
    report = fast.moec.report
    assert texts or any("shar" in note for note in report.notes) or any(layer.fallbacks for layer in report.layers)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "switch", "bert"])
def test_assigning_to_the_original_leaves_the_twin_on_the_old_weights(name: str) -> None:
    model, fast = compiled(name)
    inputs = MODELS[name].inputs(2, 9, seed=6)
    kept = run(fast, inputs).logits
    model.load_state_dict(MODELS[name].make(seed=5).state_dict(), assign=True)
    with told():
        assert_close(run(fast, inputs).logits, kept)


@pytest.mark.parametrize("name", MIXTURES)
def test_switching_the_experts_implementation_afterwards(name: str) -> None:
    """Honoured or ignored, the result stays the model's."""
    model, fast = compiled(name)
    if not hasattr(fast, "set_experts_implementation") or name in {"dbrx", "switch"}:
        pytest.skip("has only its own experts")
    inputs = MODELS[name].inputs(2, 9, seed=7)
    want = run(model, inputs).logits
    fast.set_experts_implementation("batched_mm")
    with told():
        assert_close(run(fast, inputs).logits, want)


def biased(model: Any) -> Tensor:
    buffer: Tensor = model.model.layers[1].mlp.gate.e_score_correction_bias
    return buffer


def test_a_rewritten_correction_bias_is_seen() -> None:
    """The router's buffer, written in place on either model or replaced on the twin."""
    model, fast = compiled("deepseek_v3")
    inputs = MODELS["deepseek_v3"].inputs(2, 9, seed=8)
    before = run(fast, inputs).logits
    biased(model).copy_(biased(model).flip(0))
    after = run(fast, inputs).logits
    assert not torch.allclose(after, before, atol=1e-4)
    assert_close(after, run(model, inputs).logits)
    fast.model.layers[1].mlp.gate.e_score_correction_bias = biased(model).roll(3)
    biased(model).copy_(biased(model).roll(3))
    with told():
        assert_close(run(fast, inputs).logits, run(model, inputs).logits)
