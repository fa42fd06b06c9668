"""The benchmark of training steps: its contestants compute the same, and it fails where an error is too large."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")

FOLDER = Path(__file__).parents[3] / "examples" / "benchmarks"
NAMES = ("gpu_contestants", "gpu_plot", "gpu_experts", "gpu_training")


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ModuleType, ModuleType]]:
    """gpu_contestants and gpu_training, found as when the script is run."""
    monkeypatch.syspath_prepend(str(FOLDER))
    found = {name: import_module(name) for name in NAMES}
    yield found["gpu_contestants"], found["gpu_training"]
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("text", ["E4k2D32F16", "E4k1D32F16-relu-plain"])
def test_contestants_agree(text: str, modules: tuple[ModuleType, ModuleType], device: torch.device) -> None:
    contestants, training = modules
    layer = contestants.Layer(contestants.Shape.parse(text), torch.float32, device.type).requires_grad_()
    (batch,) = contestants.make_inputs(layer.shape, torch.float32, 7, 1, device.type)
    dy = training.seed_for(batch[0])
    wanted = training.exact(layer, batch, dy)
    calls = {"moec": training.moec_call(layer)}
    for name in training.THEIRS if layer.shape.gated else ("grouped by hand",):
        calls[name] = contestants.REGISTRY[name](layer)
    for name, call in calls.items():
        found = training.errors(training.gradients(call, layer, batch, dy), wanted)
        assert list(found) == list(training.NAMES)
        assert max(found.values()) < 1e-5, name


def test_what_fails(modules: tuple[ModuleType, ModuleType]) -> None:
    _, training = modules
    names = dict.fromkeys(training.NAMES, 1e-3)
    point = training.Point("E4k2D32F16", "bf16", 8)
    point.error = {"moec": {**names, "x": 1.6e-3}, "grouped by hand": names}
    for table in (point.forward, point.step, point.kept, point.peak):
        table["moec"] = 1.0
    point.same_bits["moec"] = True
    assert point.failures() == ["E4k2D32F16 T=8: x is 1.6e-03 from fp32, torch's own 1.0e-03"]
    assert "1.6e-03" in training.show([point])
    point.error["moec"]["x"] = 1.5e-3
    assert not point.failures()
