"""Every module of the corpus is compiled and right, or left alone with a reason: never silently wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import moec
from moec.report import LayerReport, Report
from tests.corpus import CASES, Case
from tests.frontend.compare import state, state_difference
from tests.frontend.observed import Facts, example, facts

SLOW = pytest.mark.slow
# The cases written out inside forward once more are compiled with inputs; without them, and explained, in the long run.
EVERY = pytest.mark.parametrize(
    ("name", "with_inputs"),
    [
        pytest.param(
            name, given, id=f"{name}-{'given' if given else 'alone'}", marks=[] if given or not inlined else SLOW
        )
        for name in CASES
        for inlined in [name.startswith("inline.")]
        for given in (False, True)
    ],
)
# explain looks as compile does, and differs in what it leaves behind: one case in four shows that quickly.
EXPLAINED = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=SLOW if i % 4 or name.startswith("inline.") else [])
        for i, name in enumerate(sorted(CASES))
    ],
)


def compiled_layers(report: Report, kind: str) -> list[LayerReport]:
    return [layer for layer in report.layers if layer.kind == kind and layer.status == "compiled"]


def seen(name: str, with_inputs: bool) -> Facts:
    """The facts of a case that compile accepted; a case that cannot be observed alone says what to pass."""
    case, found = CASES[name], facts(name, with_inputs)
    if found.error:
        assert case.needs_inputs, f"compile raised {found.error}"
        assert not with_inputs, f"compile raised {found.error}"
        assert "example_inputs" in found.error
        pytest.skip("needs example_inputs and says so")
    return found


@EVERY
def test_outputs_are_the_originals(name: str, with_inputs: bool) -> None:
    found = seen(name, with_inputs)
    assert found.outputs == []
    assert found.repeated == ""


@EVERY
def test_side_effects_are_the_originals(name: str, with_inputs: bool) -> None:
    found = seen(name, with_inputs)
    assert found.effects == ""
    assert found.outside == ""


@EVERY
def test_the_original_is_untouched(name: str, with_inputs: bool) -> None:
    found = facts(name, with_inputs)
    assert found.untouched == ""
    assert found.random_state == ""
    assert found.original == ""
    assert found.shared == ""


@EVERY
def test_the_report_is_honest(name: str, with_inputs: bool) -> None:
    case, report = CASES[name], seen(name, with_inputs).report
    assert report is not None
    for layer in report.layers:
        check_layer(layer)
    other = "ffn" if case.kind == "moe" else "moe"
    good, others = compiled_layers(report, case.kind), compiled_layers(report, other)
    listing = "\n".join(f"{layer.name} {layer.kind} {layer.status} {layer.reason}" for layer in report.layers)
    if case.expect == "compiled":
        assert len(good) == case.layers, listing
        assert len(others) <= case.others, listing
        return
    if case.expect == "left alone":
        assert not good, listing
    assert len(good) <= case.layers, listing
    if len(good) < case.layers and not case.unseen:
        refused = [layer.reason for layer in report.layers if layer.status == "left alone"]
        assert refused, listing or "nothing was reported"
        if case.reason:
            assert any(word in reason for reason in refused for word in case.reason), listing


def check_layer(layer: LayerReport) -> None:
    if layer.status == "compiled":
        assert layer.reason == ""
        assert layer.bar is not None
        assert layer.max_error is not None
        assert layer.max_abs_error is not None
        assert max(layer.max_error, layer.max_abs_error) <= layer.bar
        assert layer.backend == "reference"
        assert layer.ir_before
        assert layer.ir_after
        return
    assert layer.status == "left alone"
    assert len(layer.reason.split()) >= 4, f"{layer.name}: {layer.reason!r} tells nothing"


@EXPLAINED
def test_explain_agrees_and_changes_nothing(name: str) -> None:
    case, module = CASES[name], CASES[name].make()
    compiled = seen(name, with_inputs=True)
    before, generator = state(module), torch.get_rng_state()
    report = moec.explain(module, example(case))
    assert state_difference(state(module), before, exact=True) == ""
    assert torch.equal(generator, torch.get_rng_state())
    assert compiled.report is not None
    assert summary(report) == summary(compiled.report)


def summary(report: Report) -> list[tuple[str, str, str]]:
    return [(layer.name, layer.kind, layer.status) for layer in report.layers]


@pytest.mark.skipif("MOEC_CORPUS_MATRIX" not in os.environ, reason="set MOEC_CORPUS_MATRIX to a file to write")
def test_write_matrix() -> None:
    rows = [line(case, facts(case.name, with_inputs=True)) for case in CASES.values()]
    Path(os.environ["MOEC_CORPUS_MATRIX"]).write_text("\n".join(rows) + "\n")


def line(case: Case, found: Facts) -> str:
    layers = found.report.layers if found.report else []
    compiled = [layer for layer in layers if layer.status == "compiled"]
    told = [f"{layer.name or '(root)'} {layer.kind} {layer.cut} {layer.max_error:.1e}" for layer in compiled]
    told += [f"{layer.name or '(root)'} {layer.kind}: {layer.reason}" for layer in layers if layer not in compiled]
    verdict = "compiled" if len(compiled) >= case.layers else ("left alone" if layers else "not seen")
    wrong = " WRONG" if found.outputs or found.effects or found.outside else ""
    return f"{case.name}\t{case.expect}\t{verdict}{wrong}\t{found.seconds:.1f} s\t{found.error or ' | '.join(told)}"
