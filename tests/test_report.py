"""The report: a table people read, JSON that machines read, and measuring later."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from moec.errors import MoecError
from moec.report import LayerReport, Report


def sample() -> Report:
    compiled = LayerReport(
        name="layers.0.mlp",
        kind="moe",
        status="compiled",
        max_error=1.3e-7,
        max_abs_error=2.5e-7,
        bar=2e-6,
        backend="reference",
        passes=("canonicalize", "fuse-experts"),
        cut="submodule",
        bytes_before=1 << 20,
        bytes_after=2 << 20,
    )
    left = LayerReport(name="layers.1.mlp", kind="ffn", status="left alone", reason="expert 3 has another activation")
    return Report(layers=[compiled, left], seconds=1.25, versions={"torch": "2.13.0"}, machine="a machine")


def test_table_has_every_layer_and_every_reason() -> None:
    text = str(sample())
    assert text.startswith("moec: 1 of 2 layers compiled in 1.2 s\n")
    row = next(line for line in text.splitlines() if line.startswith("layers.0.mlp"))
    assert row.split() == [
        *("layers.0.mlp", "moe", "compiled", "1.3e-07", "2.5e-07", "reference", "canonicalize,", "fuse-experts")
    ]
    assert "left alone: layers.1.mlp (ffn): expert 3 has another activation" in text
    assert "weights of compiled layers: 1.0 MiB before, 2.0 MiB after" in text
    assert text.endswith("a machine | torch 2.13.0")


def test_layers_left_alone_for_the_same_reason_share_a_line() -> None:
    report = sample()
    names = ("layers.2", "", *(f"layers.{i}" for i in range(3, 10)))
    report.layers += [LayerReport(name, "moe", "left alone", reason="its router is random") for name in names]
    lines = [line for line in report.summary().splitlines() if "random" in line]
    assert lines == ["left alone: layers.2 (moe), the model (moe), layers.3 (moe) and 6 more: its router is random"]


def test_a_layer_that_was_not_verified_says_so() -> None:
    report = sample()
    report.layers[0].max_error = None
    assert "not checked" in str(report)


def test_the_error_of_passes_that_change_numerics_stands_apart() -> None:
    report = sample()
    report.layers[0].numerics_error = 0.012
    assert "1.3e-07 (+0.01 asked for)" in str(report)


def test_fallbacks_and_notes_are_shown() -> None:
    report = sample()
    report.layers[0].fallbacks = 3
    report.layers[0].fallback_reasons = {"autocast is on": 2, "the input is 7 wide": 1}
    report.notes.append("hooks close over the original")
    assert "3 calls fell back to the original forward" in str(report)
    assert "compiled, 3 calls not" in str(report)
    assert "fell back: layers.0.mlp (moe): 2 calls: autocast is on\n" in str(report)
    assert "fell back: layers.0.mlp (moe): 1 call: the input is 7 wide\n" in str(report)
    assert "note: hooks close over the original" in str(report)


def test_an_empty_report_is_a_sentence() -> None:
    assert str(Report()) == "moec: no MoE or FFN layer found"


def test_json_holds_every_field() -> None:
    report = sample()
    read = json.loads(report.to_json())
    assert set(read) == {"layers", "seconds", "versions", "machine", "whole_model_error", "notes", "latency"}
    assert read["layers"][0]["name"] == "layers.0.mlp"
    assert read["layers"][0]["passes"] == ["canonicalize", "fuse-experts"]
    assert read["layers"][1]["reason"] == "expert 3 has another activation"
    assert "measurer" not in read


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_has_no_nan(value: float) -> None:
    report = sample()
    report.layers[0].max_error = value
    assert json.loads(report.to_json())["layers"][0]["max_error"] == str(value)


def test_measure_asks_the_measurer_and_shows_the_rows() -> None:
    report = sample()
    asked: list[Sequence[int]] = []

    def measurer(tokens: Sequence[int]) -> None:
        asked.append(tokens)
        report.layers[0].latency = [{"tokens": count, "before_ms": 4.0, "after_ms": 2.0} for count in tokens]

    report.measurer = measurer
    assert report.measure(tokens=[1, 8]) is report
    assert asked == [(1, 8)]
    rows = [line.split() for line in str(report).splitlines() if line.startswith("layers.0.mlp ") and "2.00x" in line]
    assert rows == [["layers.0.mlp", count, "4.00", "2.00", "2.00x"] for count in ("1", "8")]


def test_measure_without_a_model_behind_it() -> None:
    with pytest.raises(MoecError, match="MOEC504"):
        sample().measure(tokens=[1])


@pytest.mark.parametrize("tokens", [[], [0], [-1], [1.5], [True], ["8"]])
def test_measure_wants_positive_counts(tokens: list[int]) -> None:
    report = sample()
    report.measurer = lambda tokens: pytest.fail("must not run")
    with pytest.raises(MoecError, match="MOEC502"):
        report.measure(tokens=tokens)
