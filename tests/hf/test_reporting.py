"""What transformers reports about routers, and the user's hooks, survive compiling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import moec
from tests.frontend.compare import tensors
from tests.hf.agreement import assert_close, run, told
from tests.hf.models import MIXTURES, MODELS, compiled, pair

REPORTING = pytest.mark.parametrize("name", [name for name in MIXTURES if MODELS[name].router_logits])
MIXING = pytest.mark.parametrize("name", MIXTURES)
LOGITS = {"switch": ("encoder_router_logits", "decoder_router_logits")}


@REPORTING
def test_router_logits_are_reported(name: str) -> None:
    original, fast = pair(name)
    inputs = MODELS[name].inputs(2, 9, seed=1)
    want = run(original, inputs, output_router_logits=True)
    got = run(fast, inputs, output_router_logits=True)
    assert list(got.keys()) == list(want.keys())
    for key in LOGITS.get(name, ("router_logits",)):
        assert tensors(want[key]), f"{key} is empty already in the original"
        assert_close(got[key], want[key])


@REPORTING
def test_aux_loss_is_the_originals(name: str) -> None:
    original, fast = pair(name)
    inputs = MODELS[name].inputs(2, 9, seed=2)
    labels = inputs["decoder_input_ids"] if MODELS[name].encoder_decoder else inputs["input_ids"]
    want = run(original, {**inputs, "labels": labels}, output_router_logits=True)
    got = run(fast, {**inputs, "labels": labels}, output_router_logits=True)
    assert_close(got.loss, want.loss)
    for key in ("aux_loss", "encoder_aux_loss", "decoder_aux_loss"):
        if isinstance(want.get(key), torch.Tensor):
            assert float(want[key]) != 0
            assert_close(got[key], want[key])


def hook_into(calls: list[tuple[str, Any]], name: str) -> Callable[..., None]:
    def record(module: nn.Module, args: Any, output: Any) -> None:
        calls.append((name, [t.detach().clone() for t in tensors(output)]))

    return record


def hooked_parts(name: str, model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Each block and every module in it: routers, experts, single experts, projections."""
    blocks = [path for path, kind in MODELS[name].layers.items() if kind == "moe"]
    return [
        (path, part)
        for path, part in model.named_modules()
        if any(path == block or path.startswith(block + ".") for block in blocks)
    ]


@MIXING
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_are_called_as_before(name: str, when: str) -> None:
    """Forward hooks on blocks, routers and experts, registered before or after compiling."""
    original = MODELS[name].make()
    inputs = MODELS[name].inputs(2, 9, seed=3)
    calls: dict[str, list[tuple[str, Any]]] = {"original": [], "fast": []}
    current = "original"

    def record(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            calls[current].append((path, [t.detach().clone() for t in tensors(output)]))

        return hook

    if when == "before":
        for path, part in hooked_parts(name, original):
            part.register_forward_hook(record(path))
        with told():
            fast = moec.compile(original, example_inputs=MODELS[name].inputs())
    else:
        fast = moec.compile(original, example_inputs=MODELS[name].inputs())
        for model in (original, fast):
            for path, part in hooked_parts(name, model):
                part.register_forward_hook(record(path))
    calls["original"].clear()
    want = run(original, inputs).logits
    current = "fast"
    with told():
        got = run(fast, inputs).logits
    assert_close(got, want)
    assert [path for path, _ in calls["fast"]] == [path for path, _ in calls["original"]]
    for (path, mine), (_, theirs) in zip(calls["fast"], calls["original"], strict=True):
        assert len(mine) == len(theirs), path
        for a, b in zip(mine, theirs, strict=True):
            if b.is_floating_point() and b.numel():
                assert_close(a, b)


@MIXING
def test_a_hook_on_the_block_changes_the_result(name: str) -> None:
    """A forward hook that returns something else, and a pre-hook that changes the input, are obeyed."""
    original, fast = compiled(name)
    inputs = MODELS[name].inputs(2, 9, seed=4)
    plain = run(fast, inputs).logits
    block = next(path for path, kind in MODELS[name].layers.items() if kind == "moe")
    for model in (original, fast):
        part = model.get_submodule(block)
        part.register_forward_pre_hook(lambda module, args: (args[0] * 1.5, *args[1:]))
        router = next(child for path, child in part.named_children() if path in {"gate", "router"})
        router.register_forward_pre_hook(lambda module, args: (args[0] * 0.25, *args[1:]))
    with told():
        got = run(fast, inputs).logits
    assert_close(got, run(original, inputs).logits)
    assert not torch.allclose(got, plain, atol=1e-3)


def test_a_hook_that_holds_the_original_is_reported() -> None:
    """A hook on the original that closes over the original would act on the wrong twin: say so."""
    model = MODELS["mixtral"].make()

    def remember(module: nn.Module, args: Any, output: Any) -> None:
        model.last_seen = module

    model.model.layers[0].mlp.register_forward_hook(remember)
    with told() as texts:
        fast = moec.compile(model, example_inputs=MODELS["mixtral"].inputs())
    everything = " ".join([*texts, *fast.moec.report.notes, *(layer.reason for layer in fast.moec.report.layers)])
    assert "hook" in everything


@MIXING
def test_other_experts_implementations_still_run(name: str) -> None:
    """A model switched to batched or grouped experts before compiling is right, whatever of it compiles."""
    model = MODELS[name].make()
    if not hasattr(model, "set_experts_implementation") or name in {"dbrx", "switch"}:
        pytest.skip("has only its own experts")
    inputs = MODELS[name].inputs(2, 9, seed=5)
    for implementation in ("batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        fast = moec.compile(model, example_inputs=MODELS[name].inputs())
        assert_close(run(fast, inputs).logits, run(model, inputs).logits)
