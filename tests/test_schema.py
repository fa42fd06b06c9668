"""The JSON schemas that ship with moec describe what it prints, no more and no less."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import moec
from moec.benchresult import BenchResult, Row, Timing
from moec.report import LayerReport, Report

FOLDER = Path(moec.__file__).parent


def schema(name: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((FOLDER / f"{name}.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(read)
    return read


def check(value: str, name: str) -> None:
    jsonschema.Draft202012Validator(schema(name)).validate(json.loads(value))


def report() -> Report:
    full = LayerReport(
        name="a",
        kind="moe",
        status="compiled",
        max_error=1e-7,
        passes=("fuse-experts",),
        cut="slice",
        bytes_before=3,
        pass_logs=(("fuse-experts", ("did",), ("%h: why not",), "- a\n+ b"),),
    )
    left = LayerReport(name="b", kind="ffn", status="left alone", reason="why", max_error=float("nan"))
    row = Row("a", "moe", 8, Timing(4.0, 3.0, 5.0, 9), Timing(2.0, 1.0, 3.0, 9))
    full.latency = [row.latency()]
    return Report(layers=[full, left], versions={"torch": "2"}, notes=["a note"], latency=[row.latency()])


def test_a_report_fits_its_schema() -> None:
    check(report().to_json(), "report")
    check(Report().to_json(), "report")


def test_a_benchmark_fits_its_schema() -> None:
    row = Row("a", "moe", 8, Timing(4.0, 3.0, 5.0, 9), Timing(2.0, 1.0, 3.0, 9), ("b",))
    check(BenchResult([row], "machine", {"torch": "2"}, {"threads": 2}, ["note"]).to_json(), "bench")


def test_the_schema_has_every_field_of_a_layer() -> None:
    assert set(schema("report")["$defs"]["layer"]["properties"]) == {field.name for field in fields(LayerReport)}


@pytest.mark.parametrize(
    ("key", "value"), [("status", "done"), ("fallbacks", -1), ("surprise", 1), ("max_error", "big")]
)
def test_the_schema_refuses_what_is_no_report(key: str, value: object) -> None:
    wrong = json.loads(report().to_json())
    wrong["layers"][0][key] = value
    with pytest.raises(jsonschema.ValidationError):
        check(json.dumps(wrong), "report")
