"""Blocks composed at random: compiled and right, or left alone with a reason."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import moec
from tests.corpus.case import as_layout, random_tokens
from tests.frontend.compare import call, difference, state, state_difference
from tests.frontend.composed import Recipe, build, recipes
from tests.frontend.modules import report_of
from tests.frontend.observed import special_tokens

CALM = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


def check(recipe: Recipe) -> None:
    module = build(recipe)
    reference = build(recipe)
    before = state(module)
    fast = moec.compile(module)
    assert state_difference(state(module), before, exact=True) == ""
    for layer in report_of(fast).layers:
        assert layer.status == "compiled" or len(layer.reason.split()) >= 4
    flats = [random_tokens(n, recipe.dim, scale=s, seed=n) for n in (1, 3, 33, 150, 300) for s in (0.1, 1.0, 60.0)]
    flats += [tokens for _, tokens in special_tokens(recipe.dim)]
    for flat in flats:
        x = as_layout(flat, "btd")
        with torch.no_grad():
            text = difference(call(fast, (x,)), call(reference, (x,)))
        assert text == "", f"{recipe}, {tuple(x.shape)}: {text}"


@settings(max_examples=12, **CALM)  # type: ignore[arg-type]
@given(recipes())
def test_a_few_composed_blocks(recipe: Recipe) -> None:
    check(recipe)


@pytest.mark.slow
@settings(max_examples=250, **CALM)  # type: ignore[arg-type]
@given(recipes())
def test_many_composed_blocks(recipe: Recipe) -> None:
    check(recipe)
