"""The command line: exit statuses, errors without tracebacks, the same by script and module."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moec import cli
from moec.errors import MoecError
from tests.cli.running import BENCH, run


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version")[:2] == (0, "moec 0.1.0\n")
    status, out, _ = run(capsys, "--help")
    assert status == 0
    for command in cli.COMMANDS:
        assert f"\n    {command} " in out
        status, text, _ = run(capsys, command, "--help")
        assert status == 0
        assert "--json" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "required: COMMAND"),
        (["complie"], "invalid choice: 'complie'"),
        (["bench"], "required: MODEL"),
        (["bench", "m", "--tokens", "1,x"], "is not a list of positive numbers"),
        (["bench", "m", "--tokens", "0"], "is not a list of positive numbers"),
        (["bench", "m", "--tokens", ""], "is not a list of positive numbers"),
        (["bench", "m", "--threads", "0"], "is not a positive whole number"),
        (["bench", "m", "--seconds", "nan"], "is not a number of seconds"),
        (["bench", "m", "--quantize", "int4"], "invalid choice: 'int4'"),
        (["bench", "m", "--dtype", "int8"], "is not one of float32, bfloat16, float16"),
        (["demo", "--batches", "-1"], "is not a list of positive numbers"),
        (["opt"], "required: FILE"),
        (["env", "--verbose"], "unrecognized arguments"),
    ],
)
def test_a_wrong_command_line_is_status_2(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert says in err


def test_later_commands_are_not_offered() -> None:
    assert set(cli.COMMANDS) == {"demo", "inspect", "opt", "bench", "export", "tune", "doctor", "passes", "env"}


@pytest.mark.parametrize("command", ["inspect", "bench"])
def test_a_model_that_cannot_be_read_is_status_1(capsys: pytest.CaptureFixture[str], command: str) -> None:
    status, out, err = run(capsys, command, "absent/folder")
    assert (status, out) == (1, "")
    assert err.startswith("[MOEC601] absent/folder: no such file or folder\n  hint: ")


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exception, match="MOEC601"):
        cli.main(["inspect", "absent", "--debug"])


def test_interruption_is_status_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("moec.commands.env.run", interrupted)
    assert run(capsys, "env") == (130, "", "interrupted\n")


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f'"{sys.executable}" -m moec passes --json | true; exit "${{PIPESTATUS[0]}}"'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_failed_verification_under_strict_is_status_3(
    capsys: pytest.CaptureFixture[str], fake_api: SimpleNamespace, file: str, tmp_path: Path
) -> None:
    def compile(model: Any, **options: Any) -> Any:
        assert options["strict"] is True
        raise MoecError("MOEC221", "a was left alone: 3 tokens: error 0.1")

    fake_api.compile = compile
    status, out, err = run(capsys, "bench", f"{file}:pair", "--strict", "-o", str(tmp_path / "out.json"))
    assert (status, out) == (3, "")
    assert "[MOEC221]" in err
    assert not (tmp_path / "out.json").exists()


def test_the_installed_script_and_python_m_agree() -> None:
    outputs = []
    for command in ([sys.executable, "-m", "moec"], [os.path.join(os.path.dirname(sys.executable), "moec")]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
        outputs.append((done.returncode, done.stdout))
    assert outputs[0] == outputs[1] == (0, "moec 0.1.0\n")


@pytest.mark.parametrize("command", ["inspect", "bench"])
def test_a_model_without_layers_is_status_4_and_a_sentence(
    capsys: pytest.CaptureFixture[str], fake_api: SimpleNamespace, file: str, tmp_path: Path, command: str
) -> None:
    fake_api.found = []
    extra = ["--html", str(tmp_path / "out.html"), *BENCH] if command == "bench" else []
    status, out, err = run(capsys, command, f"{file}:nothing", *extra)
    assert (status, out) == (4, "")
    assert "no MoE or FFN layer found in this LayerNorm" in err
    assert not (tmp_path / "out.html").exists()
