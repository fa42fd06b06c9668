"""transformers models as they come: every layer compiled, logits and tokens equal, the model still itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import moec
from tests.frontend.compare import state, state_difference
from tests.hf.agreement import assert_all_compiled, assert_close, assert_equal, run
from tests.hf.models import MODELS, pair

EVERY = pytest.mark.parametrize("name", list(MODELS))
GENERATING = pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.generates])


@EVERY
def test_every_layer_compiles(name: str) -> None:
    _, fast = pair(name)
    report = fast.moec.report
    assert_all_compiled(report, MODELS[name])
    for layer in report.layers:
        if layer.status == "compiled":
            assert layer.max_error <= layer.bar
            assert layer.max_abs_error <= layer.bar
            assert layer.backend == "reference"


@EVERY
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 11), (2, 40), (5, 2), (1, 100)], ids=str)
def test_logits_at_unseen_shapes(name: str, shape: tuple[int, int]) -> None:
    original, fast = pair(name)
    inputs = MODELS[name].inputs(*shape, seed=shape[1])
    assert_close(run(fast, inputs).logits, run(original, inputs).logits)


@EVERY
def test_padding_and_everything_returned(name: str) -> None:
    original, fast = pair(name)
    inputs = MODELS[name].inputs(3, 9, seed=1)
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :4] = 0
    options: dict[str, Any] = {"attention_mask": mask, "output_hidden_states": True}
    got, want = run(fast, inputs, **options), run(original, inputs, **options)
    assert list(got.keys()) == list(want.keys())
    assert_close(got.logits, want.logits)
    states = "decoder_hidden_states" if MODELS[name].encoder_decoder else "hidden_states"
    assert_close(got[states], want[states])


@EVERY
def test_repeated_calls_are_bitwise_equal(name: str) -> None:
    _, fast = pair(name)
    inputs = MODELS[name].inputs(2, 17, seed=4)
    assert_equal(run(fast, inputs).logits, run(fast, inputs).logits)


@EVERY
def test_still_the_same_model(name: str) -> None:
    original, fast = pair(name)
    assert type(fast) is type(original)
    assert fast is not original
    assert list(fast.state_dict()) == list(original.state_dict())
    assert [n for n, _ in fast.named_modules()] == [n for n, _ in original.named_modules()]
    assert [type(m) for m in fast.modules()] == [type(m) for m in original.modules()]
    for (left, a), (right, b) in zip(fast.named_parameters(), original.named_parameters(), strict=True):
        assert left == right
        assert a is b


@EVERY
def test_compiling_leaves_the_original_alone(name: str) -> None:
    model = MODELS[name].make()
    inputs = MODELS[name].inputs(2, 9, seed=2)
    want, before, generator = run(model, inputs).logits, state(model), torch.get_rng_state()
    fast = moec.compile(model, example_inputs=MODELS[name].inputs())
    assert fast.config.to_dict() == model.config.to_dict()
    assert state_difference(state(model), before, exact=True) == ""
    assert torch.equal(torch.get_rng_state(), generator)
    assert_equal(run(model, inputs).logits, want)


@EVERY
def test_without_example_inputs(name: str) -> None:
    """Probes are made from parameters and dtype: the same layers, the same logits."""
    model = MODELS[name].make()
    fast = moec.compile(model)
    assert_all_compiled(fast.moec.report, MODELS[name])
    inputs = MODELS[name].inputs(2, 13, seed=3)
    assert_close(run(fast, inputs).logits, run(model, inputs).logits)


@EVERY
def test_explain_gives_the_same_report(name: str) -> None:
    model = MODELS[name].make()
    before = state(model)
    report = moec.explain(model, MODELS[name].inputs())
    assert state_difference(state(model), before, exact=True) == ""
    assert not hasattr(model, "moec")
    seen = [(layer.name, layer.kind, layer.status) for layer in report.layers]
    assert seen == [(layer.name, layer.kind, layer.status) for layer in pair(name)[1].moec.report.layers]


def start(name: str, batch: int = 2) -> dict[str, Tensor]:
    inputs = MODELS[name].inputs(batch, 6, seed=8)
    return {"input_ids": inputs["input_ids"]}


@GENERATING
def test_generates_the_same_tokens(name: str) -> None:
    original, fast = pair(name)
    options = {"max_new_tokens": 12, "do_sample": False, "no_repeat_ngram_size": 2}
    want = original.generate(**start(name), **options)
    assert torch.equal(fast.generate(**start(name), **options), want)
    assert len(set(want[0].tolist())) > 4


@GENERATING
def test_samples_and_searches_the_same_tokens(name: str) -> None:
    original, fast = pair(name)
    sampled, beams = [], []
    for model in (original, fast):
        torch.manual_seed(5)
        sampled.append(model.generate(**start(name), max_new_tokens=6, do_sample=True, top_k=20))
        beams.append(model.generate(**start(name, 1), max_new_tokens=5, num_beams=3, do_sample=False))
    assert torch.equal(*sampled)
    assert torch.equal(*beams)


@GENERATING
def test_decodes_with_a_cache_step_by_step(name: str) -> None:
    """T=1 with past keys: what generate() does most."""
    if MODELS[name].encoder_decoder:
        pytest.skip("its decoder starts from the encoder's states; generate() covers it")
    original, fast = pair(name)
    ids = MODELS[name].inputs(2, 8, seed=9)["input_ids"]
    pasts: list[Any] = [None, None]
    for step in range(ids.shape[1]):
        outputs = [
            run(model, {"input_ids": ids[:, step : step + 1]}, past_key_values=past, use_cache=True)
            for model, past in zip((original, fast), pasts, strict=True)
        ]
        pasts = [output.past_key_values for output in outputs]
        assert_close(outputs[1].logits, outputs[0].logits)
