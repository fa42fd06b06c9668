"""Large files: weights stay in files, and nothing is left where there is no room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import moec
from tests.onnx.reading import outputs, refused


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of these tests count as large."""
    monkeypatch.setattr("moec.frontends.onnx.load.LARGE", 1000)
    monkeypatch.setattr("moec.frontends.onnx.wire.SMALL", 1000)
    monkeypatch.setattr("moec.frontends.onnx.home.SMALL", 1000)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("beside", [None, True])
def test_weights_of_a_large_file_stay_in_files(beside: bool | None, file: Path, tmp_path: Path) -> None:
    import onnx_ir

    from moec.frontends.onnx.load import load

    model, home = load(file)
    assert home is not None
    held = {name: value.const_value for name, value in model.graph.initializers.items()}
    assert isinstance(held["up"], onnx_ir.ExternalTensor)
    assert held["up"].offset % 4096 == 0
    x = {"x": np.random.default_rng(1).standard_normal((23, 16)).astype(np.float32)}
    report = moec.export(file, tmp_path / "out.onnx", external_data=beside)
    assert report.load_seconds is not None
    assert np.allclose(outputs(tmp_path / "out.onnx", x)[0], outputs(file, x)[0], atol=1e-5)
    onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)
    assert len(list(tmp_path.iterdir())) == (2 if beside else 1)


@pytest.mark.usefixtures("large")
def test_weights_beside_a_large_file(file: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.onnx"
    onnx.save(onnx.load(str(file)), str(source), save_as_external_data=True, location="w.data", size_threshold=100)
    source.write_bytes(source.read_bytes())
    moec.export(source, tmp_path / "out.onnx")
    x = {"x": np.random.default_rng(1).standard_normal((23, 16)).astype(np.float32)}
    assert np.allclose(outputs(tmp_path / "out.onnx", x)[0], outputs(source, x)[0], atol=1e-5)


@pytest.mark.usefixtures("large")
def test_a_large_file_that_is_damaged(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    for size in (1500, len(whole) // 2, len(whole) - 1):
        (tmp_path / "in.onnx").write_bytes(whole[:size])
        refused("MOEC707", tmp_path / "in.onnx", tmp_path / "out.onnx")


@pytest.mark.usefixtures("large")
def test_no_room_for_the_weights_of_a_large_file(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moec.frontends.onnx.home.split", full)
    assert "No space left" in refused("MOEC607", file, tmp_path / "out.onnx").message
    assert not (tmp_path / "out.onnx").exists()
