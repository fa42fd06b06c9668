"""moec.compile with ONNX Runtime: layers of a PyTorch model, and .onnx files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

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


class Recorder:
    """A session that notes the memory it is bound to."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.read: list[int] = []
        self.written: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def io_binding(self) -> Any:
        binding = self.session.io_binding()
        binding.bind_input = self._noted(binding.bind_input, self.read)
        binding.bind_output = self._noted(binding.bind_output, self.written)
        get_outputs = binding.get_outputs
        binding.get_outputs = lambda: self._given(get_outputs())
        return binding

    def _noted(self, bind: Any, where: list[int]) -> Any:
        def noted(*args: Any) -> None:
            where.append(args[-1])
            bind(*args)

        return noted

    def _given(self, values: list[Any]) -> list[Any]:
        self.written = [value.data_ptr() for value in values]
        return values


def test_layers_read_and_write_torchs_memory() -> None:
    from moec.backends.onnx.executable import OrtExecutable
    from tests.onnx.test_int8 import store
    from tests.passes.layers import mixtral_layer

    region = mixtral_layer("m", e=6, k=2, d=32, f=24, layout="concat", fn="silu")
    runs = OrtExecutable(region, store(region))
    recorder = Recorder(runs._held.session)
    runs._held = replace(runs._held, session=recorder)
    given = torch.randn(5, 32), torch.randint(0, 6, (5, 2), dtype=torch.int32), torch.rand(5, 2)
    (y,) = runs(*given)
    assert recorder.read == [tensor.data_ptr() for tensor in given]
    assert recorder.written == [y.data_ptr()]


def test_a_file_reads_torchs_memory_and_hands_over_its_own(file: Path) -> None:
    fast = moec.compile(file)
    recorder = Recorder(fast._runtime)
    fast._runtime = recorder
    x = torch.randn(5, 16)
    y = fast(x)
    assert recorder.read == [x.data_ptr()]
    assert recorder.written == [y.data_ptr()]
    twin = torch.randn(16, 5).T
    fast(twin)
    assert recorder.read[1] != twin.data_ptr()  # what has gaps is laid out anew


def test_weights_that_are_replaced_or_written_behind_are_honoured() -> None:
    torch.manual_seed(0)
    model, x = OneLayer().eval(), torch.randn(9, 16)
    fast = moec.compile(model, backend="onnxruntime")
    with torch.no_grad():
        before = fast(x)
        other = OneLayer().eval()
        model.load_state_dict(other.state_dict())
        assert torch.allclose(fast(x), other(x), atol=1e-5)
        assert not torch.allclose(fast(x), before, atol=1e-3)
        for parameter in model.down.parameters():
            parameter.data.mul_(2)  # which no version counter sees
        moec.refresh(fast)
        assert torch.allclose(fast(x), 2 * other(x), atol=1e-5)


def test_a_file_in_int8(file: Path) -> None:
    x = torch.randn(64, 16)
    exact, fast = moec.compile(file), moec.compile(file, quantize="int8", backend="onnxruntime")
    off = float((fast(x) - exact(x)).norm() / exact(x).norm())
    assert 1e-4 < off < 3.5e-2
    assert "int8" in fast.moec.report.rewritten[0].lowering


def test_both_packages_of_the_runtime_in_one_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(providers, "_place", lambda name: "/site")
    with pytest.raises(moec.MoecError, match=r"MOEC408.*both installed"):
        moec.export(OneLayer().eval(), tmp_path / "m.onnx", (torch.randn(7, 16),))
    with pytest.raises(moec.MoecError, match=r"MOEC408.*both installed"):
        moec.compile(OneLayer().eval(), backend="onnxruntime")
    with pytest.raises(moec.MoecError, match=r"MOEC408.*both installed") as caught:
        moec.compile(tmp_path / "m.onnx")
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in str(caught.value)
    monkeypatch.setattr(providers, "_place", lambda name: "/site" if name == "onnxruntime" else "/other")
    providers.check_installed()
    monkeypatch.setattr(providers, "_place", lambda name: "/site" if name == "onnxruntime" else "")
    providers.check_installed()
