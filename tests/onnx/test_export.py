"""moec.export of torch models: exact at sizes not traced, and a file that stands alone.

B sequences, S tokens a sequence.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import moec
from moec.backends.onnx.providers import why_no_cuda
from moec.demo.data import load_model
from moec.exporter import export as exporting
from moec.exporter.apart import run_apart
from moec.exporter.check import Check
from moec.verify import FP32_BAR
from tests.onnx import models
from tests.onnx.models import OneLayer

QUICK = ("mixtral", "switch")
FAMILIES = [
    *QUICK,
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("qwen3_moe", "deepseek_v3", "gpt_oss", "dbrx", "nllb_moe")
    ),
]
# Neither is the traced one. At 40 tokens Switch's experts, which have 3 places for each sequence, drop most of them.
SHAPES = ((1, 1), (3, 5), (2, 40))


def run(path: Path, given: dict[str, torch.Tensor]) -> list[np.ndarray[Any, Any]]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    known = {one.name for one in session.get_inputs()}
    return session.run(None, {name: x.numpy() for name, x in given.items() if name in known})  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_models_are_exact_at_sizes_not_traced(name: str, tmp_path: Path) -> None:
    model, path = models.model(name), tmp_path / "model.onnx"
    report = moec.export(model, path, models.inputs(name))
    mixtures = [layer for layer in report.layers if layer.kind == "moe"]
    assert [layer.status for layer in mixtures] == ["rewritten"] * len(mixtures) != []
    assert all(layer.max_error is not None and layer.max_error <= FP32_BAR for layer in mixtures)
    assert report.routing_agreement == 1.0
    for batch, tokens in SHAPES:
        given = models.inputs(name, batch, tokens, seed=1)
        with torch.no_grad():
            theirs = model(**given, use_cache=False).logits
        mine = torch.from_numpy(run(path, given)[0])
        assert mine.shape == theirs.shape
        assert float((mine - theirs).norm() / theirs.norm()) <= FP32_BAR
    onnx.checker.check_model(str(path), full_check=True)


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, moec.ExportReport]:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("one") / "layer.onnx"
    return path, moec.export(OneLayer().eval(), path, (torch.randn(7, 16),), tokens=[1, 8], seconds=0.01)


def test_the_report(one_layer: tuple[Path, moec.ExportReport]) -> None:
    path, report = one_layer
    assert [row["tokens"] for row in report.latency] == [1, 8]
    assert report.file_bytes == path.stat().st_size
    assert report.whole_model_shapes == ["batch=1", "batch=3", "batch=5", "batch=17", "batch=65"]
    assert json.loads(report.to_json())["layers"][0]["status"] == "rewritten"
    text = str(report)
    assert "1 of 1 layers rewritten" in text
    assert "routing: 100.00% of the choices agree" in text


def test_the_file_says_what_it_is(one_layer: tuple[Path, moec.ExportReport]) -> None:
    path, report = one_layer
    model = onnx.load(str(path))
    properties = {one.key: one.value for one in model.metadata_props}
    assert properties["moec.target"] == "cpu"
    assert properties["moec.least_onnxruntime"] == report.least_onnxruntime == "1.17"
    assert properties["moec.verification"].startswith("error ")
    assert json.loads(properties["moec.layers"])[0]["written as"].startswith("sorted rows")
    assert {node.domain for node in model.graph.node} == {""}
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert sum(name.startswith("model/expert_") for name in names) >= 10
    assert any("region" in node.doc_string for node in model.graph.node)
    assert [size.dim_param for size in model.graph.input[0].type.tensor_type.shape.dim] == ["batch", ""]


def test_it_runs_in_a_process_with_onnxruntime_alone(one_layer: tuple[Path, moec.ExportReport]) -> None:
    path, _ = one_layer
    code = (
        "import sys, numpy, onnxruntime\n"
        f"session = onnxruntime.InferenceSession({str(path)!r}, providers=['CPUExecutionProvider'])\n"
        "y, = session.run(None, {'x': numpy.ones((11, 16), dtype='float32')})\n"
        "assert y.shape == (11, 16) and not {'torch', 'moec', 'onnx'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=path.parent)
    assert done.returncode == 0, done.stderr


def test_weights_beside_the_file(tmp_path: Path) -> None:
    path, x = tmp_path / "layer.onnx", torch.randn(7, 16)
    model = OneLayer(hidden=96).eval()
    report = moec.export(model, path, (x,), external_data=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["layer.onnx", "layer.onnx.data"]
    assert report.file_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert np.allclose(run(path, {"x": x})[0], model(x).detach().numpy(), atol=1e-6)


def test_the_digits_model_in_int8_is_under_a_megabyte(tmp_path: Path) -> None:
    path, model = tmp_path / "digits.onnx", load_model()
    images = torch.rand(1, 8, 8)
    report = moec.export(model, path, (images,), target="portable", quantize="int8", static=True)
    assert report.file_bytes < 1_000_000
    assert all(layer.max_error is not None and 1e-4 < layer.max_error < 0.035 for layer in report.rewritten)
    found = onnx.load(str(path))
    assert {node.domain for node in found.graph.node} == {""}
    for value in (*found.graph.input, *found.graph.output):
        assert all(size.dim_value for size in value.type.tensor_type.shape.dim)
    assert report.peak_bytes is None or 100_000 < report.peak_bytes < 100_000_000
    assert report.peak_bytes is None or "at its peak in a process of its own" in str(report)
    with torch.no_grad():
        theirs = model(images).numpy()
    assert np.linalg.norm(run(path, {"images": images})[0] - theirs) <= 0.05 * np.linalg.norm(theirs)


def test_dynamic_images_where_the_model_takes_any_number_of_them(tmp_path: Path) -> None:
    path, model = tmp_path / "digits.onnx", load_model()
    report = moec.export(model, path, (torch.rand(1, 8, 8),))
    assert report.whole_model_shapes[-1] == "batch=65"
    images = torch.rand(130, 8, 8)
    with torch.no_grad():
        theirs = model(images).numpy()
    assert np.linalg.norm(run(path, {"images": images})[0] - theirs) <= FP32_BAR * np.linalg.norm(theirs)


class Strict(nn.Module):
    """x[N, 16] -> [N, 16], with code that torch.export cannot express around the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = OneLayer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x)
        return y if float(y.abs().max()) > 0 else x


@pytest.mark.parametrize(
    ("model", "example", "options", "code"),
    [
        (OneLayer(), None, {}, "MOEC703"),
        (OneLayer(), [torch.zeros(2, 16)], {}, "MOEC213"),
        (OneLayer(), (torch.zeros(2, 16),), {"target": "gpu"}, "MOEC502"),
        (OneLayer(), (torch.zeros(2, 16),), {"quantize": "int3"}, "MOEC502"),
        (OneLayer(), (torch.zeros(2, 16),), {"tokens": [0]}, "MOEC502"),
        (OneLayer(), (torch.zeros(2, 16),), {"quantise": "int8"}, "MOEC501"),
        (OneLayer(), (torch.zeros(2, 5),), {}, "MOEC211"),
        ("model.pt", (torch.zeros(2, 16),), {}, "MOEC209"),
        (nn.Linear(4, 4), (torch.zeros(2, 4),), {}, "MOEC705"),
        (Strict(), (torch.randn(3, 16),), {}, "MOEC702"),
        (OneLayer().to("meta"), (torch.randn(3, 16),), {}, "MOEC503"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_refusals_write_nothing(model: Any, example: Any, options: dict[str, Any], code: str, tmp_path: Path) -> None:
    with pytest.raises(moec.MoecError) as caught:
        moec.export(model, tmp_path / "out.onnx", example, **options)
    assert caught.value.code == code, caught.value
    assert list(tmp_path.iterdir()) == []


def test_what_a_file_cannot_check_is_noted(tmp_path: Path) -> None:
    report = moec.export(models.model("switch"), tmp_path / "m.onnx", models.inputs("switch"), target="cuda")
    if why_no_cuda():
        assert report.notes[0] == f"checked and timed on the CPU: {why_no_cuda()}"
    assert any("one-hot rows; the file takes the first expert" in note for note in report.notes)


def test_a_failed_check_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Check(why="7 tokens: error 1.0e+00 above 2e-06", labels=["7 tokens"])
    monkeypatch.setattr("moec.exporter.lowerings.check_region", lambda *args: wrong)
    with pytest.raises(moec.MoecError, match="MOEC704") as caught:
        moec.export(OneLayer().eval(), tmp_path / "out.onnx", (torch.randn(7, 16),))
    assert "7 tokens: error 1.0e+00" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_static_file_that_does_not_run_elsewhere_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path, feed: Any) -> int:
        assert path.exists()
        raise RuntimeError("a process of its own does not run it: no such op")

    monkeypatch.setattr(exporting, "run_apart", broken)
    with pytest.raises(moec.MoecError, match=r"MOEC704.*no such op"):
        moec.export(OneLayer().eval(), tmp_path / "out.onnx", (torch.randn(7, 16),), static=True)
    assert list(tmp_path.iterdir()) == []


def test_a_checkout_that_is_not_installed_exports_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "versions", dict)
    moec.export(OneLayer().eval(), tmp_path / "m.onnx", (torch.randn(7, 16),))
    properties = {one.key: one.value for one in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert properties["moec.version"] == "a checkout"


def test_what_a_clean_process_says(tmp_path: Path) -> None:
    (tmp_path / "no.onnx").write_bytes(b"nothing")
    with pytest.raises(RuntimeError, match="a process of its own does not run it"):
        run_apart(tmp_path / "no.onnx", {"x": np.zeros(1, np.float32)})


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onnx_ir.save", full)
    with pytest.raises(moec.MoecError, match=r"MOEC607.*No space left"):
        moec.export(OneLayer().eval(), tmp_path / "out.onnx", (torch.randn(7, 16),))
    assert list(tmp_path.iterdir()) == []


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = OneLayer().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moec.export(model, tmp_path / "out.onnx", (torch.randn(7, 16),))
    assert model.training
    assert "forward" not in model.__dict__
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert exporting.export is moec.export
