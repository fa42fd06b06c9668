"""What the tests of reading share: running files, and rewriting or refusing them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import moec


def outputs(path: Path, feed: dict[str, Any]) -> list[Any]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, feed)  # type: ignore[no-any-return]


def check_rewritten(source: Path, tmp_path: Path, layers: int, feed: dict[str, Any]) -> moec.ExportReport:
    """Rewritten as sorted rows, and the same results at a size that moec did not try."""
    out = tmp_path / "out.onnx"
    report = moec.export(source, out)
    assert [layer.status for layer in report.layers if layer.kind == "moe"] == ["rewritten"] * layers
    assert report.routing_agreement in (1.0, None)  # nobody sees what an op chooses by itself
    nodes = onnx.load(str(out), load_external_data=False).graph.node
    assert sum("/expert_" in node.name for node in nodes) >= 2 * layers
    for mine, theirs in zip(outputs(out, feed), outputs(source, feed), strict=True):
        assert np.linalg.norm(mine - theirs) <= 2e-6 * np.linalg.norm(theirs)
    return report


def ids(batch: int, tokens: int) -> dict[str, Any]:
    return {"input_ids": np.random.default_rng(5).integers(3, 120, (batch, tokens))}


def refused(code: str, source: Path, out: Path, **options: Any) -> moec.MoecError:
    with pytest.raises(moec.MoecError) as caught:
        moec.export(source, out, **options)
    assert caught.value.code == code, caught.value
    return caught.value
