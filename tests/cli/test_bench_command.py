"""moec bench: tables, JSON and pages, and nothing half-written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.cli.running import BENCH, REGION, layers, run


def test_bench_prints_a_table(capsys: pytest.CaptureFixture[str], fake_api: SimpleNamespace, file: str) -> None:
    status, out, err = run(capsys, "bench", f"{file}:pair", *BENCH, "--pack", "--quantize", "int8")
    assert status == 0, err
    assert [line.split()[:2] for line in out.splitlines() if line.startswith(("a ", "whole"))] == [
        ["a", "1"],
        ["a", "3"],
        ["whole", "model"],
        ["whole", "model"],
    ]
    assert "left alone: b (ffn): its activation is not known" in out
    assert "pack True, quantize int8" in out
    assert fake_api.asked["pack"] is True
    assert fake_api.asked["quantize"] == "int8"
    assert "bench 1/4: a at T=1" in err  # progress, and not on stdout


def test_bench_writes_json_and_a_page(
    capsys: pytest.CaptureFixture[str], fake_api: SimpleNamespace, file: str, tmp_path: Path
) -> None:
    page, data = tmp_path / "out.html", tmp_path / "out.json"
    status, out, _ = run(capsys, "bench", f"{file}:pair", *BENCH, "--json", "--html", str(page), "-o", str(data))
    assert status == 0
    assert json.loads(out) == json.loads(data.read_text())
    assert {row["name"] for row in json.loads(out)["rows"]} == {"a", "whole model"}
    assert page.read_text().startswith("<!doctype html>")
    assert {entry.name for entry in tmp_path.iterdir()} >= {"out.html", "out.json"}
    assert not [entry for entry in tmp_path.iterdir() if entry.name.endswith(".partial")]


def test_bench_checks_where_it_writes_before_it_works(
    capsys: pytest.CaptureFixture[str], fake_api: SimpleNamespace, file: str, tmp_path: Path
) -> None:
    status, _, err = run(capsys, "bench", f"{file}:pair", "--html", str(tmp_path / "absent" / "out.html"))
    assert status == 1
    assert "[MOEC607]" in err
    assert fake_api.asked == {}


def test_bench_makes_inputs_as_wide_as_the_layers(
    capsys: pytest.CaptureFixture[str], fake_api: SimpleNamespace, file: str
) -> None:
    fake_api.found[0].ir_before = REGION.format(name="a")
    status, out, err = run(capsys, "bench", f"{file}:without_inputs", *BENCH, "--json")
    assert status == 0, err
    assert [row["tokens"] for row in json.loads(out)["rows"] if row["name"] == "whole model"] == [1, 3]


def test_bench_without_inputs_says_what_to_pass(
    capsys: pytest.CaptureFixture[str], fake_api: SimpleNamespace, file: str
) -> None:
    status, _, err = run(capsys, "bench", f"{file}:without_inputs", *BENCH)
    assert status == 1
    assert "[MOEC605] cannot guess the inputs of Pair" in err
    assert "(model, make_inputs)" in err


def test_bench_when_every_layer_was_left_alone(
    capsys: pytest.CaptureFixture[str], fake_api: SimpleNamespace, file: str
) -> None:
    fake_api.found = layers()[1:]
    status, out, err = run(capsys, "bench", f"{file}:pair", *BENCH)
    assert (status, out) == (4, "")
    assert "its activation is not known" in err
    assert f"moec inspect {file}:pair --why b" in err


@pytest.fixture
def _threads() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
def test_bench_sets_threads(capsys: pytest.CaptureFixture[str], fake_api: SimpleNamespace, file: str) -> None:
    _, out, _ = run(capsys, "bench", f"{file}:pair", *BENCH, "--threads", "1", "--json")
    assert json.loads(out)["settings"]["threads"] == 1
