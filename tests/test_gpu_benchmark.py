"""The GPU benchmark's contestants compute the same layer, and its table and plot say what was measured."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "examples" / "benchmarks"
THEIRS = ("eager", "batched_mm", "grouped_mm")
ON_CPU = (*THEIRS, "grouped by hand")
Modules = tuple[ModuleType, ModuleType, ModuleType]


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[Modules]:
    """gpu_contestants, gpu_experts and gpu_plot, found as when the script is run."""
    monkeypatch.syspath_prepend(str(FOLDER))
    from importlib import import_module

    names = ("gpu_contestants", "gpu_experts", "gpu_plot")
    contestants, experts, plot = (import_module(name) for name in names)
    yield contestants, experts, plot
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("text", ["E4k2D32F16", "E4k2D32F16-gelu", "E4k1D32F16-relu-plain"])
def test_contestants_agree(text: str, modules: Modules) -> None:
    contestants, experts, _ = modules
    shape = contestants.Shape.parse(text)
    assert str(shape) == text
    layer = contestants.Layer(shape, torch.float32, "cpu")
    (batch,) = contestants.make_inputs(shape, torch.float32, 5, 1, "cpu")
    for name in ON_CPU:
        if not shape.gated and name in THEIRS:
            with pytest.raises(contestants.Unfit, match="gate"):
                contestants.REGISTRY[name](layer)
            continue
        y = contestants.REGISTRY[name](layer)(*batch)
        assert experts.error_of(layer, batch, y) < 1e-5, name


def test_a_layer_that_is_none(modules: Modules) -> None:
    with pytest.raises(ValueError, match="is no layer; write it like E8k2"):
        modules[0].Shape.parse("Mixtral")


def test_table_and_plot(modules: Modules) -> None:
    _, experts, plot = modules
    times = {"moec": 12.0, "eager": 33.0}
    point = experts.Point("E4k2D32F16", "bf16", 8, 10.0, times, {"moec": 11.0}, {"moec": 40.0}, {"moec": 1e-3})
    shown = experts.show([point], ["moec", "eager", "vllm"])
    assert "3.00x" in shown
    assert "0.91" in shown
    svg = plot.plot([(point.layer, 8, 10.0, times), (point.layer, 64, 10.0, {"moec": 11.0, "eager": None})])
    root = ElementTree.fromstring(svg)
    assert len(root.findall(".//{*}polyline")) == 2
