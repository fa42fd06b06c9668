"""Every kind of cut that the front end finds, as a file: rows by their places, tensors beside the tokens, and refusals.

T tokens, D model width.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import moec
import tests.corpus.expert_choice
import tests.corpus.placed  # noqa: F401
from moec.exporter.calls import _routing
from moec.frontends.torch.routing import FORMS
from moec.verify import FP32_BAR
from tests.corpus.case import CASES
from tests.onnx.reading import outputs


@pytest.mark.parametrize(
    "name",
    [
        "placed.slots",
        "placed.mask_beside_tokens",
        pytest.param("placed.two_tasks", marks=pytest.mark.slow),
        pytest.param("placed.two_tasks_last_axis", marks=pytest.mark.slow),
    ],
)
def test_layers_of_every_cut(name: str, tmp_path: Path) -> None:
    case, path = CASES[name], tmp_path / "m.onnx"
    model = case.make()
    report = moec.export(model, path, case.inputs(torch.randn(12, case.dim)))
    assert "rewritten" in {layer.status for layer in report.layers}
    given = case.inputs(torch.randn(20, case.dim))
    with torch.no_grad():
        found = model(*given)
    names = ("x", "mask")[: len(given)]
    feed = {one: tensor.numpy() for one, tensor in zip(names, given, strict=True)}
    for mine, theirs in zip(outputs(path, feed), found if isinstance(found, tuple) else (found,), strict=True):
        assert np.linalg.norm(mine - theirs.numpy()) <= FP32_BAR * np.linalg.norm(theirs.numpy())


def test_experts_that_choose_their_tokens_are_left_alone(tmp_path: Path) -> None:
    case = CASES["choice.methods"]
    with pytest.raises(moec.MoecError, match=r"MOEC705.*its experts choose their tokens, which is not exported yet"):
        moec.export(case.make(), tmp_path / "m.onnx", case.inputs(torch.randn(12, case.dim)))
    assert list(tmp_path.iterdir()) == []


def test_a_size_that_was_fixed_while_tracing_is_a_failed_check(tmp_path: Path) -> None:
    """The router computes its capacity in Python, from the number of tokens."""
    case = CASES["placed.capacity_submodule"]
    with pytest.raises(moec.MoecError, match=r"MOEC704"):
        moec.export(case.make(), tmp_path / "m.onnx", case.inputs(torch.randn(12, case.dim)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", FORMS)
def test_routing_is_told_as_at_run_time(form: str) -> None:
    tokens, experts, slots = 8, 4, 1 if form == "places" else 2
    ids = torch.stack([torch.randperm(experts)[:slots] for _ in range(tokens)])
    weights = torch.rand(tokens, slots)
    selector: torch.Tensor | None = ids
    if "mask" in form:
        selector = nn.functional.one_hot(ids, experts)
        selector[0, 0] = 0
    if form == "dense":
        weights = torch.zeros(tokens, experts).scatter(1, ids, weights)
    mine = _routing(form, selector, weights, tokens, experts, slots)
    for a, b in zip(mine, FORMS[form](selector, weights, tokens, experts, slots), strict=True):
        assert torch.equal(a.long() if not a.is_floating_point() else a, b.long() if not b.is_floating_point() else b)
