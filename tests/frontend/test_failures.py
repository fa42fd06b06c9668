"""Interrupts, errors and failed checks while compiling leave the model as it was, and say what happened."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import moec
from tests.corpus import CASES
from tests.frontend.compare import state, state_difference
from tests.frontend.modules import agree, compiled, left_alone, report_of, tokens, told
from tests.frontend.observed import example


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, type[BaseException]], Callable[[], int]]:
    """Counts every linear projection that runs, and raises at a chosen one."""

    def start(at: int, error: type[BaseException]) -> Callable[[], int]:
        count, linear = [0], torch.nn.functional.linear

        def run(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == at:
                raise error("now")
            return linear(*args, **kwargs)

        monkeypatch.setattr(torch.nn.functional, "linear", run)
        return lambda: count[0]

    return start


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.95, 1.0])
@pytest.mark.parametrize("inplace", [False, True], ids=["twin", "inplace"])
@pytest.mark.parametrize("name", ["two_blocks", "loop_stacked.swiglu", "ffn.swiglu"])
def test_keyboard_interrupt(name: str, inplace: bool, share: float, runs: Any, monkeypatch: Any) -> None:
    """Ctrl-C at the first, a middle or the last projection that compile runs."""
    case = CASES[name]
    counter = runs(-1, KeyboardInterrupt)
    moec.compile(case.make(), example_inputs=example(case), inplace=inplace)
    total = counter()
    assert total > 3
    monkeypatch.undo()
    model, reference = case.make(), case.make()
    before, generator = state(model), torch.get_rng_state()
    runs(max(1, int(total * share)), KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        moec.compile(model, example_inputs=example(case), inplace=inplace)
    monkeypatch.undo()
    assert state_difference(state(model), before, exact=True) == ""
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.is_grad_enabled()
    agree(model, reference, tokens(name), bar=0.0)


REFUSED = ["inline.near.random_selection", "experts.batch_mean", "inline.effects.input_scaled_in_place"]


@pytest.mark.parametrize("share", [0.3, 0.95])
def test_an_error_in_the_users_code(share: float, runs: Any, monkeypatch: Any) -> None:
    """Raised once, in the middle of probing: left alone with the user's words, or tried again; never a crash."""
    case = CASES["loop_stacked.swiglu"]
    counter = runs(-1, ValueError)
    moec.compile(case.make(), example_inputs=example(case))
    total = counter()
    monkeypatch.undo()
    model = case.make()
    runs(max(1, int(total * share)), ValueError)
    fast = moec.compile(model, example_inputs=example(case))
    monkeypatch.undo()
    agree(fast, case.make(), tokens(case.name))
    refused = left_alone(report_of(fast))
    assert all("now" in layer.reason or "ValueError" in layer.reason for layer in refused), refused


@pytest.mark.parametrize("inplace", [False, True], ids=["twin", "inplace"])
@pytest.mark.parametrize("name", REFUSED)
def test_strict_turns_left_alone_into_an_error(name: str, inplace: bool) -> None:
    model = CASES[name].make()
    before = state(model)
    with pytest.raises(moec.MoecError) as caught:
        moec.compile(model, example_inputs=example(CASES[name]), strict=True, inplace=inplace)
    assert caught.value.code.startswith("MOEC2")
    report = report_of(moec.compile(CASES[name].make(), example_inputs=example(CASES[name])))
    reason = left_alone(report)[0].reason
    assert reason[:30] in str(caught.value), "the error repeats the reason"
    assert state_difference(state(model), before, exact=True) == ""


@pytest.mark.parametrize("name", ["loop_list.swiglu", "ffn.swiglu"])
def test_strict_with_nothing_to_complain_about(name: str) -> None:
    model, fast = compiled(name, strict=True)
    agree(fast, model, tokens(name))


@pytest.mark.parametrize("name", ["loop_list.swiglu", "ffn.swiglu"])
def test_strict_turns_fallbacks_into_errors(name: str) -> None:
    """At run time too: a later change of dtype that would fall back raises instead, with a code."""
    _, fast = compiled(name, strict=True)
    fast.double()
    args = tuple(a.double() for a in tokens(name))
    with torch.no_grad():
        try:
            fast(*args)
        except moec.MoecError as error:
            assert error.code.startswith("MOEC2")  # noqa: PT017 - not raising is right too
    assert all(layer.fallbacks == 0 for layer in report_of(fast).layers)


@pytest.mark.parametrize("name", ["loop_list.swiglu", "written.flat_pack", "ffn.swiglu"])
def test_a_fallback_is_told_once_and_counted(name: str) -> None:
    """A hook registered later: each call goes to the original, the first one warns with a code."""
    module, fast = compiled(name)
    for part in fast.modules():
        part.register_forward_hook(lambda part, args, result: None)
    with told() as texts:
        for count in (3, 4, 5):
            agree(fast, module, tokens(name, count))
    counts = [layer.fallbacks for layer in report_of(fast).layers if layer.status == "compiled"]
    if any(counts):
        assert max(counts) >= 3
        assert 1 <= len(texts) <= len(counts)
        assert all("[MOEC2" in text for text in texts)


def test_no_fallbacks_in_ordinary_use() -> None:
    module, fast = compiled("loop_list.swiglu")
    with told() as texts:
        for count in (1, 2, 33, 130):
            agree(fast, module, tokens("loop_list.swiglu", count))
    assert texts == []
    assert all(layer.fallbacks == 0 for layer in report_of(fast).layers)


@pytest.mark.parametrize("prefix", ["", "inline."])
def test_a_failed_verification_names_the_probe(prefix: str) -> None:
    """More than 64 tokens go through another activation: found by verification, reported with probe and errors."""
    case = CASES[f"{prefix}batch.other_formula_long"]
    (layer,) = report_of(moec.compile(case.make(), example_inputs=example(case))).layers
    assert layer.status == "left alone"
    assert layer.failing_probe is not None
    assert "tokens" in layer.failing_probe
    assert layer.failing_probe in layer.reason
    assert layer.max_error is not None
    assert layer.bar is not None
    assert layer.max_error > layer.bar
    with pytest.raises(moec.MoecError) as caught:
        moec.compile(case.make(), example_inputs=example(case), strict=True)
    assert caught.value.code.startswith("MOEC2")
    assert layer.failing_probe in str(caught.value)
