"""moec opt: IR text in, IR text out."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from tests.cli.running import REGION, run


@pytest.fixture
def ir_file(tmp_path: Path) -> Path:
    path = tmp_path / "layer.moe"
    path.write_text(REGION.format(name="a"))
    return path


def test_opt_prints_what_it_read(capsys: pytest.CaptureFixture[str], ir_file: Path) -> None:
    status, out, err = run(capsys, "opt", str(ir_file))
    assert (status, err) == (0, "")
    assert out == ir_file.read_text()


def test_opt_runs_passes(capsys: pytest.CaptureFixture[str], ir_file: Path) -> None:
    status, out, _ = run(capsys, "opt", str(ir_file), "--passes", "canonicalize")
    assert status == 0
    assert "%a = act" in out
    assert "%b" not in out  # nobody reads it


def test_opt_shows_the_diff(capsys: pytest.CaptureFixture[str], ir_file: Path) -> None:
    status, out, _ = run(capsys, "opt", str(ir_file), "--passes", "canonicalize,canonicalize", "--diff")
    assert status == 0
    assert out.startswith("--- canonicalize on a\n")
    assert "%b = act(%h)" in out
    assert out.endswith("--- canonicalize on a: no change\n")


def test_opt_verbose_tells_on_stderr(capsys: pytest.CaptureFixture[str], ir_file: Path) -> None:
    _, out, err = run(capsys, "opt", str(ir_file), "--passes", "canonicalize,fuse-experts", "-v")
    assert out.startswith("region a")
    assert err.startswith("a: canonicalize: ")


def test_opt_json_and_output(capsys: pytest.CaptureFixture[str], ir_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.moe"
    status, out, _ = run(capsys, "opt", str(ir_file), "--passes", "canonicalize", "-o", str(target))
    assert (status, out) == (0, "")
    status, out, _ = run(capsys, "opt", str(ir_file), "--passes", "canonicalize", "--json")
    read = json.loads(out)
    assert read["ir"] + "\n" == target.read_text()
    assert [(row["region"], row["name"]) for row in read["passes"]] == [("a", "canonicalize")]
    assert read["passes"][0]["done"]


def test_opt_reads_standard_input_and_programs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = REGION.format(name="a") + "\n" + REGION.format(name="b")
    monkeypatch.setattr(sys, "stdin", io.StringIO(program))
    status, out, _ = run(capsys, "opt", "-", "--passes", "canonicalize", "--json")
    assert status == 0
    assert [row["region"] for row in json.loads(out)["passes"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("act(%h)", "atc(%h)", ["[MOEC121] {file}: unknown op", "at line 4", 'did you mean "act"?']),
        ("f32[T, 8]", "f32[T, 9]", ["[MOEC112] {file}: ", "at line 3"]),
        ("return %a", "return %z", ["[MOEC110] {file}: ", "%z"]),
        ("region a", "", ["[MOEC120] {file}: "]),
    ],
)
def test_opt_says_where_the_text_is_wrong(
    capsys: pytest.CaptureFixture[str], ir_file: Path, tmp_path: Path, old: str, new: str, says: list[str]
) -> None:
    ir_file.write_text(ir_file.read_text().replace(old, new))
    status, out, err = run(capsys, "opt", str(ir_file), "-o", str(tmp_path / "out.moe"))
    assert (status, out) == (1, "")
    for text in says:
        assert text.format(file=ir_file) in err
    assert not (tmp_path / "out.moe").exists()


@pytest.mark.parametrize(
    ("passes", "says"),
    [
        ("fuse-expert", 'did you mean "fuse-experts"?'),
        ("plan-capacity{factr=1}", 'did you mean "factor"?'),
        ("plan-capacity{", "MOEC305"),
    ],
)
def test_opt_with_wrong_passes(capsys: pytest.CaptureFixture[str], ir_file: Path, passes: str, says: str) -> None:
    status, out, err = run(capsys, "opt", str(ir_file), "--passes", passes)
    assert (status, out) == (1, "")
    assert says in err


def test_opt_with_files_that_cannot_be_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for file, says in (("absent", "no such file"), ("", "is a folder"), ("binary", "is not UTF-8 text")):
        status, _, err = run(capsys, "opt", str(tmp_path / file))
        assert status == 1
        assert "[MOEC601]" in err
        assert says in err
