"""Layers and files that would be slower stay, and the command says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import moec
from moec.cli import main
from tests.onnx import written
from tests.onnx.reading import outputs, refused


def test_the_command(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(file), "-o", str(tmp_path / "out.onnx")]) == 0
    assert "1 of 1 layers rewritten" in capsys.readouterr().out
    assert main(["export", str(file), "-o", str(file)]) == 1
    assert "MOEC706" in capsys.readouterr().err


def test_a_slower_form_is_not_written(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("export", "slower"):
        monkeypatch.setattr(f"moec.exporter.{module}.SLOWER", 0.0)
    error = refused("MOEC705", file, tmp_path / "out.onnx", tokens=[4], seconds=0.0)
    assert "can be rewritten" in error.message
    assert "it would be slower" in error.message
    monkeypatch.setattr("moec.exporter.slower.SLOWER", 1e9)
    error = refused("MOEC705", file, tmp_path / "out.onnx", tokens=[4], seconds=0.0)
    assert "the rewritten file would be slower" in error.message
    assert main(["export", str(file), "-o", str(tmp_path / "out.onnx"), "--tokens", "4", "--seconds", "0"]) == 4
    assert not (tmp_path / "out.onnx").exists()


class Two(nn.Module):
    """Two layers, one after the other: x[T, 16] -> [T, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = written.Dense(), written.Capacity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x + self.first(x)
        y: torch.Tensor = h + self.second(h)
        return y


def test_a_layer_that_would_be_slower_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    source = written.by_torch(Two(), torch.randn(7, 16), tmp_path / "in.onnx", "x")
    found = iter(["slower", ""])
    monkeypatch.setattr("moec.exporter.export._time_both", lambda *args: next(found))
    told = iter(["it would be slower: 2 ms instead of 1 at 4 tokens", ""])
    monkeypatch.setattr("moec.exporter.place_layer.slower_alone", lambda *args: next(told))
    report = moec.export(source, tmp_path / "out.onnx", tokens=[4])
    assert [layer.status for layer in report.layers] == ["left alone", "rewritten"]
    assert report.layers[0].reason.startswith("it would be slower")
    x = {"x": np.random.default_rng(1).standard_normal((23, 16)).astype(np.float32)}
    assert np.allclose(outputs(tmp_path / "out.onnx", x)[0], outputs(source, x)[0], atol=1e-5)


@pytest.mark.parametrize("form", ["slots", "places", "logits"])
def test_a_layer_is_timed_alone_beside_its_own_nodes(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.onnx.own_ops import moe_file

    source = {
        "slots": lambda: written.dense(tmp_path / "in.onnx"),
        "places": lambda: written.capacity(tmp_path / "in.onnx"),
        "logits": lambda: moe_file(tmp_path / "in.onnx", activation_type="relu", normalize_routing_weights=1),
    }[form]()
    monkeypatch.setattr("moec.exporter.export.SLOWER", 0.0)
    monkeypatch.setattr("moec.exporter.slower.SLOWER", 0.0)
    assert "ms instead of" in refused("MOEC705", source, tmp_path / "out.onnx", tokens=[1, 4], seconds=0.0).message
