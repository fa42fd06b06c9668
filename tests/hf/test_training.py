"""Training mode runs the original forward; gradients are the original's in train and in eval mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.hf.agreement import assert_close, assert_equal, run, told
from tests.hf.models import MODELS, compiled, pair

EVERY = pytest.mark.parametrize("name", list(MODELS))


def loss_and_gradients(name: str, model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    inputs = MODELS[name].inputs(2, 9, seed=6)
    labels = inputs["decoder_input_ids"] if MODELS[name].encoder_decoder else inputs["input_ids"]
    torch.manual_seed(21)
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), gradients


@EVERY
def test_training_mode_is_the_original(name: str) -> None:
    """Bitwise: dropout draws the same numbers, gradients reach the same parameters."""
    model, fast = compiled(name)
    model.train()
    with told():
        loss, gradients = loss_and_gradients(name, fast.train())
    want_loss, want = loss_and_gradients(name, model)
    assert_equal(loss, want_loss)
    assert gradients.keys() == want.keys()
    for key, gradient in gradients.items():
        assert torch.equal(gradient, want[key]), key


@EVERY
def test_back_in_eval_mode_it_is_compiled_again(name: str) -> None:
    model, fast = compiled(name)
    inputs = MODELS[name].inputs(2, 9, seed=7)
    before = run(fast, inputs).logits
    fast.train()
    with told():
        run(fast, inputs)
    fast.eval()
    model.eval()
    counts = [layer.fallbacks for layer in fast.moec.report.layers]
    assert_equal(run(fast, inputs).logits, before)
    assert [layer.fallbacks for layer in fast.moec.report.layers] == counts
    assert_close(before, run(model, inputs).logits)


@EVERY
def test_training_calls_are_counted(name: str) -> None:
    _, fast = compiled(name)
    fast.train()
    with told() as texts:
        run(fast, MODELS[name].inputs(2, 9))
        run(fast, MODELS[name].inputs(2, 9))
    layers = [layer for layer in fast.moec.report.layers if layer.status == "compiled"]
    assert all(layer.fallbacks == 2 for layer in layers)
    assert len(texts) <= len(layers), "each layer warns once"


@EVERY
def test_gradients_in_eval_mode(name: str) -> None:
    """Recording gradients in eval (a frozen model under a probe, LoRA): the original's, never silently none."""
    original, fast = pair(name)
    with told():
        loss, gradients = loss_and_gradients(name, fast)
    want_loss, want = loss_and_gradients(name, original)
    assert_close(loss, want_loss)
    assert gradients.keys() == want.keys()
    for key, gradient in gradients.items():
        if bool(want[key].any()):
            assert_close(gradient, want[key], bar=1e-4)  # a backward pass through all layers and the loss
        else:
            assert not gradient.any(), key


def test_gradients_of_the_input_in_eval_mode() -> None:
    original, fast = pair("mixtral")
    embedded = original.get_input_embeddings()(MODELS["mixtral"].inputs()["input_ids"]).detach()
    gradients = []
    for model in (original, fast):
        leaf = embedded.clone().requires_grad_()
        with told():
            model(inputs_embeds=leaf).logits.square().sum().backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
        model.zero_grad(set_to_none=True)
    assert_close(gradients[1], gradients[0], bar=1e-4)


def test_an_optimizer_step_is_seen() -> None:
    """Fine-tuning through the twin: the next evaluation uses the new weights, in both models."""
    model, fast = compiled("mixtral")
    inputs = MODELS["mixtral"].inputs(2, 9, seed=8)
    before = run(fast, inputs).logits
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.3)
    fast.train()
    with told():
        fast(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    fast.eval()
    model.eval()
    after = run(fast, inputs).logits
    assert not torch.allclose(after, before, atol=1e-3)
    assert_close(after, run(model, inputs).logits)
