"""moec doctor: known defects are seen where they are, and what is right is called right."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from moec.backends.onnx import defects
from moec.cli import main


@pytest.fixture(scope="module")
def findings() -> dict[tuple[str, str], defects.Finding]:
    return {(one.name, one.op): one for one in defects.examine()}


def test_what_the_portable_and_log_weight_forms_rest_on(findings: dict[tuple[str, str], defects.Finding]) -> None:
    for name in ("moe-normalized", "moe-log-weights"):
        assert findings[name, "MoE"].status == "right", findings[name, "MoE"]
    for name in ("qmoe-normalized", "qmoe-log-weights"):
        assert findings[name, "QMoE"].status == "right", findings[name, "QMoE"]


def test_the_defects_of_the_pinned_release(findings: dict[tuple[str, str], defects.Finding]) -> None:
    import onnxruntime

    if onnxruntime.__version__ != "1.31.1":
        pytest.skip("measured on 1.31.1")
    assert (findings["B1", "MoE"].status, findings["B1", "MoE"].found) == ("wrong", "all zeros")
    assert findings["B2", "QMoE"].status == "wrong"
    assert findings["B3", "MoE"].status == "wrong"


def test_a_wrong_result_is_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defects, "run_op", lambda op, layer, *_, **__: np.ones_like(layer.x))
    assert {one.status for one in defects.examine()} == {"wrong"}


def test_an_op_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(op: str, layer: defects.Layer, *args: Any, **attributes: Any) -> Any:
        if attributes.get("normalize_routing_weights") == 0 or "quant_type" in attributes:
            raise RuntimeError("no such op\nand more")
        return np.zeros_like(layer.x)

    monkeypatch.setattr(defects, "run_op", missing)
    found = {one.name: one for one in defects.examine()}
    assert (found["B1"].status, found["B1"].found) == ("refused", "no such op")


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {one["status"] for one in told["findings"]} <= {"right", "wrong", "refused"}
    assert main(["doctor"]) == 0
    assert "--target portable uses ONNX's own ops alone" in capsys.readouterr().out
