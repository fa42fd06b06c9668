"""moec env and moec passes."""

from __future__ import annotations

import json

import pytest

from tests.cli.running import run


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "env")
    assert status == 0
    assert "torch 2" in out
    status, out, _ = run(capsys, "env", "--json")
    assert set(json.loads(out)) == {"machine", "versions", "devices", "warnings"}


def test_passes(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "passes")
    assert status == 0
    assert "fuse-experts\n" in out
    assert "plan-capacity  (changes results, so it runs only when asked for)" in out
    status, out, _ = run(capsys, "passes", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert rows["quantize-experts"]["changes_numerics"] is True
    assert {"name", "type", "required"} <= set(rows["plan-capacity"]["options"][0])
