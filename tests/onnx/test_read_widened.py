"""Files that compute in bf16: refused, or read and written in fp32 when asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

import moec
from moec.cli import main
from moec.frontends.onnx.widen import in_fp32
from tests.onnx import written
from tests.onnx.reading import outputs, refused


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return written.OneLayerStacked().bfloat16().eval()


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bf16") / "in.onnx"
    return written.by_torch(model(), torch.randn(7, 16).bfloat16(), path, "x")


def check_exact(out: Path) -> None:
    """What the model gives with its weights widened, at a size that was not tried."""
    x = torch.randn(23, 16, generator=torch.Generator().manual_seed(1))
    (mine,) = outputs(out, {"x": x.numpy()})
    with torch.no_grad():
        theirs = model().float()(x).numpy()
    assert mine.dtype == np.float32
    assert np.linalg.norm(mine - theirs) <= 2e-6 * np.linalg.norm(theirs)


def test_a_file_in_bf16_is_refused(narrow: Path, tmp_path: Path) -> None:
    error = refused("MOEC707", narrow, tmp_path / "out.onnx")
    assert "--widen" in str(error.hint)
    assert "widen" not in str(refused("MOEC707", damaged(tmp_path), tmp_path / "out.onnx").hint)
    assert not (tmp_path / "out.onnx").exists()
    with pytest.raises(moec.MoecError, match="MOEC502"):
        moec.export(narrow, tmp_path / "out.onnx", widen="yes")


def damaged(folder: Path) -> Path:
    (folder / "text.onnx").write_bytes(b"not a model")
    return folder / "text.onnx"


def test_a_file_in_bf16_becomes_one_in_fp32(narrow: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.onnx"
    assert main(["export", str(narrow), "-o", str(out), "--widen", "--tokens", "4", "--seconds", "0"]) == 0
    said = capsys.readouterr()
    assert "checked as the file with bf16 widened to fp32" in said.out
    assert "not timed" in said.out
    assert "Traceback" not in said.err
    check_exact(out)
    assert onnxruntime.InferenceSession(str(out)).get_inputs()[0].type == "tensor(float)"
    held = {tensor.data_type for tensor in onnx.load(str(out)).graph.initializer}
    assert onnx.TensorProto.BFLOAT16 not in held


def test_a_large_file_in_bf16(narrow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("load.LARGE", "wire.SMALL", "home.SMALL"):
        monkeypatch.setattr(f"moec.frontends.onnx.{name}", 1000)
    moec.export(narrow, tmp_path / "out.onnx", widen=True)
    check_exact(tmp_path / "out.onnx")


def test_a_file_in_fp32_is_not_widened(file: Path, tmp_path: Path) -> None:
    report: Any = moec.export(file, tmp_path / "out.onnx", widen=True)
    assert not report.checked_as


def test_a_sequence_stays_a_sequence() -> None:
    low = ir.DataType.BFLOAT16
    x = ir.Value(name="x", shape=ir.Shape(["T", 4]), type=ir.TensorType(low))
    node = ir.node("SequenceConstruct", [x, x])
    (y,) = node.outputs
    y.name, y.type = "y", ir.SequenceType(ir.TensorType(low))
    graph = ir.Graph([x], [y], nodes=[node], opset_imports={"": 20}, name="sequences")
    wide = in_fp32(ir.Model(graph, ir_version=10))
    assert wide.graph.outputs[0].type == ir.SequenceType(ir.TensorType(ir.DataType.FLOAT))
    assert wide.graph.inputs[0].dtype == ir.DataType.FLOAT
    assert y.type == ir.SequenceType(ir.TensorType(low)), "the model itself stays"
