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
    # Normalising a row of nearly nothing shows the rounding of what it was summed from.
    bar = 1e-4 if recipe.epilogue == "norm" else 2e-6
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
            text = difference(call(fast, (x,)), call(reference, (x,)), bar)
        assert text == "", f"{recipe}, {tuple(x.shape)}: {text}"


# Found by the long run below; each once came out wrong.
FOUND = {
    "weights of one, another token's NaN": Recipe(
        "sorted", "swiglu", 2, 1, 6, 5, "softmax", "none", "top", "sum", "none", "none", True, 0
    ),
    "weights of one that underflow to zero": Recipe(
        "sorted", "swiglu", 8, 1, 16, 8, "softplus", "selection", "groups", "l2", "none", "none", True, 68
    ),
    "weights of one that can be minus one": Recipe(
        "gathered", "relu", 8, 1, 13, 16, "raw", "none", "groups", "l2", "clamp", "token gate", True, 92
    ),
    "an expert that every token of a short batch picks": Recipe(
        "loop_list", "gelu", 6, 4, 8, 21, "softmax", "selection", "rolled", "scaled", "gain on input", "none", True, 46
    ),
    "a negated expert that one token in a thousand picks": Recipe(
        "loop_stacked",
        "relu",
        8,
        1,
        13,
        8,
        "sigmoid",
        "selection",
        "rolled",
        "sum",
        "negated expert",
        "token gate",
        True,
        20,
    ),
}


@pytest.mark.parametrize("recipe", FOUND.values(), ids=FOUND)
def test_blocks_that_were_wrong_once(recipe: Recipe) -> None:
    check(recipe)


@settings(max_examples=12, **CALM)  # type: ignore[arg-type]
@given(recipes())
def test_a_few_composed_blocks(recipe: Recipe) -> None:
    check(recipe)


@pytest.mark.slow
@settings(max_examples=250, **CALM)  # type: ignore[arg-type]
@given(recipes())
def test_many_composed_blocks(recipe: Recipe) -> None:
    check(recipe)
