"""moec export on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moec.cli import main

FACTORY = """
import torch
from tests.onnx.models import OneLayer

def build():
    torch.manual_seed(0)
    return OneLayer(), lambda tokens: torch.randn(tokens, 16)

def plain():
    return torch.nn.Linear(4, 4), lambda tokens: torch.randn(tokens, 4)

def unknown():
    return OneLayer()
"""


@pytest.fixture
def module(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FACTORY, encoding="utf-8")
    return path


def test_export_of_a_factory(module: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.onnx"
    assert main(["export", f"{module}:build", "-o", str(out), "--json", "--tokens", "1,4", "--seconds", "0"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert out.is_file()
    assert found["source"] == f"{module}:build"
    assert [row["tokens"] for row in found["latency"]] == [1, 4]
    assert [layer["status"] for layer in found["layers"]] == ["rewritten"]


def test_static_and_int8(module: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.onnx"
    assert main(["export", f"{module}:build", "-o", str(out), "--static", "3", "--quantize", "int8"]) == 0
    assert "int8 weights and rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("factory", "status", "code"), [("plain", 4, "MOEC705"), ("unknown", 1, "MOEC605"), ("nothing", 1, "MOEC603")]
)
def test_exit_statuses(
    factory: str, status: int, code: str, module: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", f"{module}:{factory}", "-o", str(tmp_path / "out.onnx")]) == status
    assert code in capsys.readouterr().err
    assert not (tmp_path / "out.onnx").exists()


def test_a_place_that_cannot_be_written_is_told_first(module: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", f"{module}:build", "-o", "/nowhere/out.onnx"]) == 1
    assert "MOEC607" in capsys.readouterr().err
