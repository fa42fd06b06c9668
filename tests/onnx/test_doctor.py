"""moec doctor: known defects are seen where they are, and what is right is called right."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import numpy as np
import pytest

from moec.backends.onnx import defects, defects_cuda
from moec.backends.onnx.providers import CPU, why_no_cuda
from moec.cli import main

pytestmark = pytest.mark.xdist_group("doctor")  # every defect is examined once


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
    assert findings["B4", "ReduceMax"].found == "[0, 32] instead of [0, 1]"


def test_a_wrong_result_is_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defects, "run_op", lambda op, layer, *_, **__: np.ones_like(layer.x))
    assert {one.status for one in defects.examine() if one.op != "ReduceMax"} == {"wrong"}


def test_an_op_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(op: str, layer: defects.Layer, *args: Any, **attributes: Any) -> Any:
        if attributes.get("normalize_routing_weights") == 0 or "quant_type" in attributes:
            raise RuntimeError("no such op\nand more")
        return np.zeros_like(layer.x)

    monkeypatch.setattr(defects, "run_op", missing)
    found = {one.name: one for one in defects.examine()}
    assert (found["B1"].status, found["B1"].found) == ("refused", "no such op")


def test_the_cases_for_cuda_expect_the_right_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, which has no kernel for a third matrix and none for bf16, and needs no word about raw weights."""
    on_cpu = partial(defects_cuda.run_on_cuda, providers=[CPU])
    monkeypatch.setattr(defects_cuda, "run_on_cuda", on_cpu)
    # It rounds rows to int8 as well.
    monkeypatch.setitem(defects_cuda.CLOSE, "fp16", 2.5e-2)
    status = {one.name: one.status for one in defects_cuda.examine_cuda()}
    others = {"cuda-gated-silu": "refused", "cuda-gated-gelu": "refused", "cuda-swiglu-bf16": "refused"}
    assert status == {name: others.get(name, "right") for name in status}


def test_what_cuda_files_rest_on_is_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {case.name for case in defects_cuda.CASES}
    assert names.issuperset(name for rests in defects_cuda.RESTS_ON.values() for name in rests)
    monkeypatch.setattr(defects_cuda, "run_on_cuda", lambda op, layer, *_, **__: np.ones_like(layer.x))
    assert {one.status for one in defects_cuda.examine_cuda()} == {"wrong"}


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {one["status"] for one in told["findings"]} <= {"right", "wrong", "refused"}
    assert told["safe"]["--target cpu"] == "safe"
    assert ("CUDAExecutionProvider" in told["examined"]) == (not why_no_cuda())
    assert main(["doctor"]) == 0
    assert "--target portable: safe: uses ONNX's own ops alone" in capsys.readouterr().out
