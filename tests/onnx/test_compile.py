"""moec.compile with ONNX Runtime: layers of a PyTorch model, and .onnx files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import moec
from moec.backends.onnx import providers
from tests.onnx import models, written
from tests.onnx.models import OneLayer


def test_layers_of_a_torch_model() -> None:
    model, given = models.model("mixtral"), models.inputs("mixtral", 3, 9)
    fast = moec.compile(model, example_inputs=models.inputs("mixtral"), backend="onnxruntime")
    assert [layer.backend for layer in fast.moec.report.layers] == ["onnxruntime"] * 2
    assert "Gemm" in fast.moec.report.layers[0].plan
    with torch.no_grad():
        mine, theirs = fast(**given).logits, model(**given).logits
    assert float((mine - theirs).norm() / theirs.norm()) < 2e-6


def test_writes_to_weights_are_honoured() -> None:
    torch.manual_seed(0)
    model, x = OneLayer().eval(), torch.randn(9, 16)
    fast = moec.compile(model, backend="onnxruntime")
    with torch.no_grad():
        before = fast(x)
        for parameter in model.down.parameters():
            parameter.mul_(2)
        assert torch.allclose(fast(x), 2 * before, atol=1e-5)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written.dense(tmp_path_factory.mktemp("compile") / "in.onnx")


def test_a_file_is_something_to_call(file: Path) -> None:
    before = set(file.parent.iterdir())
    fast = moec.compile(str(file))
    torch.manual_seed(0)
    x = torch.randn(23, 16)
    theirs = written.Dense()
    torch.manual_seed(0)
    theirs = written.Dense().eval()
    with torch.no_grad():
        expected = theirs(x)
    assert float((fast(x) - expected).norm() / expected.norm()) < 2e-6
    assert isinstance(fast(x=x.numpy()), np.ndarray)
    assert [layer.status for layer in fast.moec.report.layers] == ["rewritten"]
    assert set(file.parent.iterdir()) == before


def test_what_a_file_does_not_take(file: Path) -> None:
    for options, code in (({"backend": "reference"}, "MOEC502"), ({"pack": True}, "MOEC503"), ({"pck": 1}, "MOEC501")):
        with pytest.raises(moec.MoecError, match=code):
            moec.compile(file, **options)
    fast = moec.compile(file)
    for args, kwargs in (((), {}), ((), {"y": 1}), ((torch.zeros(2, 5),), {}), ((1, 2), {})):
        with pytest.raises(moec.MoecError, match="MOEC404"):
            fast(*args, **kwargs)


def test_results_outlive_the_next_call_and_odd_inputs_are_taken(file: Path) -> None:
    fast = moec.compile(file)
    x, other = torch.randn(4, 16), torch.randn(4, 16)
    first = fast(x)
    kept = first.clone()
    fast(other)
    assert torch.equal(first, kept)
    assert fast(torch.randn(16, 4).T).shape == (4, 16)
    assert fast(torch.zeros(0, 16)).shape == (0, 16)
    assert torch.equal(fast(x.requires_grad_()), kept)


def test_both_packages_of_the_runtime_in_one_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(providers, "_place", lambda name: "/site")
    with pytest.raises(moec.MoecError, match=r"MOEC408.*both installed"):
        moec.export(OneLayer().eval(), tmp_path / "m.onnx", (torch.randn(7, 16),))
    monkeypatch.setattr(providers, "_place", lambda name: "/site" if name == "onnxruntime" else "/other")
    providers.check_installed()
    monkeypatch.setattr(providers, "_place", lambda name: "/site" if name == "onnxruntime" else "")
    providers.check_installed()
