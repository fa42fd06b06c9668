"""Every family of transformers with a mixture of experts: compiled and equal, at any shape and token by token.

The quick run takes one of each kind of router and expert, the long one all families and their options.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable
from typing import Any

import pytest
import torch

import moec
from tests.frontend.compare import tensors
from tests.hf.agreement import assert_close, run, told
from tests.zoo.families import FAMILIES
from tests.zoo.model import RELEASE, inputs, make, pair, parts, transformers
from tests.zoo.options import ENTRIES, QUICK

pytestmark = pytest.mark.skipif(not transformers.__version__.startswith(RELEASE), reason="the zoo of another release")


def names(chosen: Iterable[str] = ENTRIES, quick: Collection[str] = QUICK) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in chosen]
    )


def generates(name: str) -> bool:
    return "ForCausalLM" in FAMILIES[ENTRIES[name].family].cls


def reports_routing(name: str) -> bool:
    """Whether the model hands out its routers' logits when asked to."""
    cls, config = parts(ENTRIES[name])
    asked = "output_router_logits" in inspect.signature(cls.forward).parameters or hasattr(
        config, "output_router_logits"
    )
    return asked and "router_logits" in (getattr(cls, "_can_record_outputs", None) or {})


def test_the_families_are_those_of_the_release() -> None:
    assert len(FAMILIES) == 73
    assert len({entry.family for entry in ENTRIES.values()}) == 73
    assert set(QUICK) <= set(ENTRIES)


@names()
def test_every_mixture_is_compiled(name: str) -> None:
    _, fast = pair(name)
    report = fast.moec.report
    listing = "\n".join(f"{layer.name} {layer.kind} {layer.status} {layer.reason}" for layer in report.layers)
    mixtures = [layer for layer in report.layers if layer.kind == "moe" and layer.compiled]
    assert ENTRIES[name].instead in listing, listing
    assert len({layer.name for layer in mixtures}) == ENTRIES[name].mixtures, listing
    for layer in mixtures:
        assert max(layer.max_error, layer.max_abs_error) <= layer.bar
    assert report.whole_model_error < 1e-5


@names()
def test_outputs_at_shapes_that_were_not_probed(name: str) -> None:
    original, fast = pair(name)
    with told() as texts:
        for batch, tokens in ((1, 1), (3, 11), (2, 34)):
            given = inputs(ENTRIES[name], batch, tokens, seed=tokens)
            assert_close(run(fast, given), run(original, given))
    assert texts == [], "a compiled layer ran its original code"


@names([name for name in ENTRIES if generates(name)])
def test_generated_tokens(name: str) -> None:
    original, fast = pair(name)
    prompt = inputs(ENTRIES[name], 2, 5, seed=9)["input_ids"]
    options = {"max_new_tokens": 8, "do_sample": False, "no_repeat_ngram_size": 2}
    want = original.generate(prompt, **options)
    assert want.shape[1] == 13
    assert torch.equal(fast.generate(prompt, **options), want)


@names([name for name in ENTRIES if reports_routing(name)], quick=("deepseek_v2", "jetmoe", "llama4"))
def test_router_logits_and_auxiliary_loss(name: str) -> None:
    # Hooks that record routers are put on at the first such call and stay: not on a model that others share.
    original = make(ENTRIES[name])
    fast = moec.compile(original, example_inputs=inputs(ENTRIES[name]))
    given = inputs(ENTRIES[name], 2, 9, seed=2)
    asked: dict[str, Any] = {"output_router_logits": True}
    if "labels" in inspect.signature(type(original).forward).parameters:
        asked["labels"] = given["input_ids"]
    with told():
        got, want = run(fast, given, **asked), run(original, given, **asked)
    assert list(got.keys()) == list(want.keys())
    assert_close(got, want)
    assert tensors(want["router_logits"]), "the original hands out none"
    if isinstance(want.get("aux_loss"), torch.Tensor):
        assert float(want["aux_loss"]) != 0


@pytest.mark.slow
@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_other_ways_to_compute_experts(name: str, experts: str) -> None:
    """transformers' own implementations of experts are layers like any other."""
    entry = FAMILIES[name]
    model = make(entry, experts=experts)
    fast = moec.compile(model, example_inputs=inputs(entry))
    report = fast.moec.report
    compiled = {layer.name for layer in report.compiled if layer.kind == "moe"}
    assert len(compiled) == entry.mixtures, report.summary()
    given = inputs(entry, 3, 11, seed=1)
    assert_close(run(fast, given), run(model, given))
