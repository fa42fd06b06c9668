"""What explain() tells of a layer: the probes and the worst of them, or what failed first, with values."""

from __future__ import annotations

import re

import pytest
import torch

import moec
from moec.commands.inspect import describe
from moec.report import LayerReport
from moec.verify import compare_results
from tests.corpus import CASES


def layer_of(name: str) -> LayerReport:
    (layer,) = [layer for layer in moec.explain(CASES[name].make()).layers if layer.kind == CASES[name].kind]
    return layer


def test_a_compiled_layer_lists_its_probes() -> None:
    layer = layer_of("loop_list.swiglu")
    assert len(layer.probes) > 12
    assert layer.worst_probe in layer.probes
    assert layer.tried == ()
    told = describe(layer)
    assert "probes: " in told
    assert re.search(r"1, 2, 3, 5, 16, 131, 515(, \d+)* tokens", told) or "515 tokens" in told
    assert f"worst on {layer.worst_probe}" in told


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("wider.centred_gate", r"nearest: .*, which makes \S+ of \S+ and \S+, the code \S+$"),
        ("experts.clamp_result", r"nearest: x = .*, experts = .*, weights = .*: error \S+, y\[\d+, \d+\] is -?500,"),
    ],
)
def test_a_candidate_left_alone_shows_values(name: str, shown: str) -> None:
    layer = layer_of(name)
    assert layer.status == "left alone"
    assert "nearest" not in layer.reason, "values differ by layer: layers of one reason could not share a line"
    assert any(re.search(shown, line) for line in layer.tried), layer.tried
    assert f"tried: {layer.tried[0]}" in describe(layer)
    assert layer.to_dict()["tried"] == layer.tried


def test_a_failed_check_says_where_and_what() -> None:
    layer = layer_of("batch.other_formula_long")
    assert layer.status == "left alone"
    assert layer.failing_probe == layer.probes[-1]
    assert layer.reason.startswith(f"verification failed at {layer.failing_probe}: error ")
    assert re.search(r"; furthest at \[[\d, ]+\]: \S+, the original has \S+$", layer.reason)


def test_a_mask_that_no_probe_reached_is_named() -> None:
    layer = layer_of("batch.capacity_rare")
    assert layer.status == "left alone"
    assert layer.reason.startswith("experts' rows are masked by more than their expert ids: the result of ")


def test_the_furthest_place_is_named() -> None:
    theirs = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    mine = theirs.clone()
    mine[1, 0] = 2.5
    assert compare_results(mine, theirs).furthest == "furthest at [1, 0]: 2.5, the original has 3"
    mine[0, 1] = float("nan")
    found = compare_results(mine, theirs)
    assert found.mismatch
    assert found.furthest == "furthest at [0, 1]: nan, the original has 2"
    assert compare_results(theirs, theirs).furthest == ""


def test_random_numbers_in_eval_are_shown_by_two_seeds() -> None:
    before = torch.get_rng_state()
    layer = layer_of("choice.noise_in_eval")
    assert torch.equal(before, torch.get_rng_state())
    assert layer.reason == "the block draws random numbers"
    line = layer.tried[0]
    found = re.search(r"is (\S+) with one seed and (\S+) with another$", line)
    assert found is not None, line
    assert found[1] != found[2]
