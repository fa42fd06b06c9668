"""moec.export of ONNX files: what other exporters write is recognised, proved and rewritten; all else is left alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import moec
from tests.onnx import written
from tests.onnx.reading import check_rewritten, ids, outputs, refused

FAMILIES = [
    "mixtral",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss")),
]


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_that_gather_their_weights(name: str, tmp_path: Path) -> None:
    source = written.batched(name, tmp_path / "in.onnx")
    report = check_rewritten(source, tmp_path, 2, ids(4, 9))
    assert all(".layers." in layer.name and layer.name.endswith("experts") for layer in report.rewritten)
    fn = {"gpt_oss": "interleaved, clamped at 7"}.get(name, "silu, concat")
    assert all(fn in layer.evidence[1] for layer in report.rewritten)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_that_sort_their_rows_as_transformers_exports_them(name: str, tmp_path: Path) -> None:
    check_rewritten(written.grouped(name, tmp_path / "in"), tmp_path, 2, ids(4, 9))


def test_a_loop_over_experts_of_an_old_opset(tmp_path: Path) -> None:
    source = written.looped(tmp_path / "in.onnx")
    x = np.random.default_rng(1).standard_normal((23, 16)).astype(np.float32)
    report = check_rewritten(source, tmp_path, 1, {"x": x})
    assert report.opset == 18


def test_dense_experts(tmp_path: Path) -> None:
    source = written.dense(tmp_path / "in.onnx")
    x = np.random.default_rng(1).standard_normal((23, 16)).astype(np.float32)
    report = check_rewritten(source, tmp_path, 1, {"x": x})
    assert "gelu, concat" in report.layers[0].evidence[1]


@pytest.mark.parametrize("choices", [1, 2])
def test_experts_with_a_capacity(choices: int, tmp_path: Path) -> None:
    """40 tokens for 5 experts of 6 places: some are dropped, and dropped ones stay zero."""
    source = written.capacity(tmp_path / "in.onnx", choices)
    x = np.random.default_rng(1).standard_normal((40, 16)).astype(np.float32)
    report = check_rewritten(source, tmp_path, 1, {"x": x})
    assert "expert" in report.layers[0].evidence[-1]
    (y,) = outputs(tmp_path / "out.onnx", {"x": x})
    assert (np.abs(y).max(-1) == 0).any()


def test_weights_in_bfloat16_that_are_widened(tmp_path: Path) -> None:
    source = written.widened(tmp_path / "in.onnx")
    x = np.random.default_rng(1).standard_normal((23, 16)).astype(np.float32)
    check_rewritten(source, tmp_path, 1, {"x": x})


def test_a_file_in_16_bits(tmp_path: Path) -> None:
    source, out = written.half(tmp_path / "in.onnx"), tmp_path / "out.onnx"
    report = moec.export(source, out)
    assert [layer.status for layer in report.layers] == ["rewritten"]
    feed = {"x": np.random.default_rng(1).standard_normal((23, 16)).astype(np.float16)}
    (mine,), (theirs,) = outputs(out, feed), outputs(source, feed)
    assert mine.dtype == theirs.dtype
    assert np.linalg.norm((mine - theirs).astype(np.float32)) <= 4e-3 * np.linalg.norm(theirs.astype(np.float32))


class Plain(nn.Module):
    """A dense FFN behind a norm: x[T, 16] -> [T, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        y: torch.Tensor = x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))
        return y


def test_a_dense_ffn_is_rewritten_when_it_is_quantized(tmp_path: Path) -> None:
    source, out = written.by_torch(Plain(), torch.randn(7, 16), tmp_path / "in.onnx", "x"), tmp_path / "out.onnx"
    assert "unless it is quantized" in refused("MOEC705", source, out).message
    report = moec.export(source, out, quantize="int8")
    assert [(layer.kind, layer.status) for layer in report.layers] == [("ffn", "rewritten")]
    assert report.whole_model_error is not None
    assert 1e-5 < report.whole_model_error < 0.035


def test_int8_of_a_file(tmp_path: Path) -> None:
    source, out = written.dense(tmp_path / "in.onnx"), tmp_path / "out.onnx"
    report = moec.export(source, out, quantize="int8")
    assert report.whole_model_error is not None
    assert 1e-4 < report.whole_model_error < 0.035


def test_moecs_own_files_can_be_read(tmp_path: Path) -> None:
    from tests.onnx.models import OneLayer

    torch.manual_seed(0)
    moec.export(OneLayer().eval(), tmp_path / "in.onnx", (torch.randn(7, 16),))
    x = np.random.default_rng(1).standard_normal((23, 16)).astype(np.float32)
    check_rewritten(tmp_path / "in.onnx", tmp_path, 1, {"x": x})


def test_files_that_moec_rewrote_can_be_rewritten(tmp_path: Path) -> None:
    """The names of what it wrote are taken."""
    source = written.dense(tmp_path / "in.onnx")
    moec.export(source, tmp_path / "first.onnx")
    report = moec.export(tmp_path / "first.onnx", tmp_path / "out.onnx", quantize="int8")
    assert [layer.status for layer in report.layers] == ["rewritten"]
    feed = {"x": np.random.default_rng(1).standard_normal((23, 16)).astype(np.float32)}
    (mine,), (theirs,) = outputs(tmp_path / "out.onnx", feed), outputs(source, feed)
    assert np.linalg.norm(mine - theirs) <= 0.05 * np.linalg.norm(theirs)
