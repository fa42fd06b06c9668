"""Layers in functions of an ONNX file: a function within a function, called twice, with weights as its inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.onnx.functions import functions
from tests.onnx.reading import check_rewritten


@pytest.mark.parametrize("weights", [2, 1])
def test_a_function_called_twice(weights: int, tmp_path: Path) -> None:
    """Each call is a layer, with weights of its own or with those of the other."""
    source = functions(tmp_path / "in.onnx", weights=weights)
    x = np.random.default_rng(1).standard_normal((23, 16)).astype(np.float32)
    report = check_rewritten(source, tmp_path, 2, {"x": x})
    assert len({layer.name for layer in report.layers}) == 2
    held = [tuple(tensor.dims) for tensor in onnx.load(str(tmp_path / "out.onnx")).graph.initializer]
    assert held.count((24, 16)) == held.count((16, 24)) == 5 * weights, "equal weights are one"
    assert not onnx.load(str(tmp_path / "out.onnx")).functions
    onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)
