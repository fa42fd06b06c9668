"""moec inspect: what was found, and why not more."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from tests.cli.running import run


def test_inspect_lists_layers_and_reasons(
    capsys: pytest.CaptureFixture[str], fake_api: SimpleNamespace, file: str
) -> None:
    status, out, _ = run(capsys, "inspect", f"{file}:pair")
    assert status == 0
    assert "1 of 2 layers" in out
    assert "left alone: b (ffn): its activation is not known" in out
    assert fake_api.asked["example_inputs"][0].shape == (1, 16, 4)


def test_inspect_without_inputs_leaves_probes_to_moec(
    capsys: pytest.CaptureFixture[str], fake_api: SimpleNamespace, file: str
) -> None:
    assert run(capsys, "inspect", f"{file}:without_inputs")[0] == 0
    assert fake_api.asked["example_inputs"] is None


def test_inspect_why(capsys: pytest.CaptureFixture[str], fake_api: SimpleNamespace, file: str) -> None:
    status, out, _ = run(capsys, "inspect", f"{file}:pair", "--why", "a")
    assert status == 0
    assert out.startswith("a (ffn): compiled\nevidence: two linears\n")
    assert "\nIR:\nregion a\n" in out
    status, out, _ = run(capsys, "inspect", f"{file}:pair", "--why", "b", "--json")
    assert [layer["name"] for layer in json.loads(out)["layers"]] == ["b"]
    status, _, err = run(capsys, "inspect", f"{file}:pair", "--why", "c")
    assert status == 1
    assert err.endswith("[MOEC608] no candidate layer is named 'c'\n  hint: there are: a, b\n")
