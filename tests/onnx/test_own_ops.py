"""MoE and QMoE nodes in a file: read by their documentation, proved against the runtime, refused where it is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import moec
from tests.onnx import written
from tests.onnx.own_ops import moe_file
from tests.onnx.reading import check_rewritten, outputs

X = {"x": np.random.default_rng(1).standard_normal((23, 32)).astype(np.float32)}


def reason(source: Path, out: Path, **options: Any) -> str:
    with pytest.raises(moec.MoecError) as caught:
        moec.export(source, out, **options)
    assert caught.value.code == "MOEC705"
    assert not out.exists()
    return caught.value.message


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "identity"])
def test_moe(activation: str, tmp_path: Path) -> None:
    source = moe_file(tmp_path / "in.onnx", activation_type=activation, normalize_routing_weights=1)
    report = moec.export(source, tmp_path / "out.onnx")
    assert [layer.status for layer in report.layers] == ["rewritten"], report
    assert "MoE" not in {node.op_type for node in onnx.load(str(tmp_path / "out.onnx")).graph.node}
    (mine,), (theirs,) = outputs(tmp_path / "out.onnx", X), outputs(source, X)
    assert np.linalg.norm(mine - theirs) <= 2e-6 * np.linalg.norm(theirs)


def test_moe_of_sequences(tmp_path: Path) -> None:
    """x[B, S, D], as onnxruntime-genai writes it; other numbers of tokens are tried as sequences of one."""
    source = moe_file(tmp_path / "in.onnx", activation_type="relu", normalize_routing_weights=1, sequences=True)
    report = moec.export(source, tmp_path / "out.onnx")
    assert [layer.status for layer in report.layers] == ["rewritten"], report
    x = {"x": np.random.default_rng(1).standard_normal((2, 9, 32)).astype(np.float32)}
    (mine,), (theirs,) = outputs(tmp_path / "out.onnx", x), outputs(source, x)
    assert mine.shape == theirs.shape
    assert np.linalg.norm(mine - theirs) <= 2e-6 * np.linalg.norm(theirs)


def test_swiglu_as_gpt_oss_has_it(tmp_path: Path) -> None:
    numbers: dict[str, Any] = {"activation_alpha": 1.702, "activation_beta": 1.0, "swiglu_limit": 0.5}
    source = moe_file(tmp_path / "in.onnx", gated=True, normalize_routing_weights=1, **numbers)
    report = moec.export(source, tmp_path / "out.onnx")
    assert "interleaved, clamped at 0.5" in report.rewritten[0].evidence[1]
    (mine,), (theirs,) = outputs(tmp_path / "out.onnx", X), outputs(source, X)
    assert np.linalg.norm(mine - theirs) <= 2e-6 * np.linalg.norm(theirs)


@pytest.mark.parametrize(("bits", "block"), [(8, 0), (8, 32), (4, 32)])
def test_qmoe_is_written_anew_on_request_alone(bits: int, block: int, tmp_path: Path) -> None:
    source = moe_file(tmp_path / "in.onnx", bits=bits, block=block, activation_type="relu", normalize_routing_weights=1)
    assert "quantized as they are" in reason(source, tmp_path / "out.onnx")
    report = moec.export(source, tmp_path / "out.onnx", quantize="int8")
    assert report.whole_model_error is not None
    assert report.whole_model_error < 0.035


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"normalize_routing_weights": 0}, "B1"),
        ({"normalize_routing_weights": 0, "bits": 8}, "B2"),
        ({"normalize_routing_weights": 1, "use_sparse_mixer": 1}, "B3"),
    ],
)
def test_what_the_runtime_gets_wrong_is_refused_by_name(options: dict[str, Any], word: str, tmp_path: Path) -> None:
    source = moe_file(tmp_path / "in.onnx", activation_type="relu", **options)
    assert word in reason(source, tmp_path / "out.onnx")


def test_moecs_own_nodes_can_be_read(tmp_path: Path) -> None:
    moec.export(written.dense_silu(tmp_path / "a.onnx"), tmp_path / "in.onnx", target="cuda")
    assert "MoE" in {node.op_type for node in onnx.load(str(tmp_path / "in.onnx")).graph.node}
    x = np.random.default_rng(1).standard_normal((23, 16)).astype(np.float32)
    check_rewritten(tmp_path / "in.onnx", tmp_path, 1, {"x": x})
