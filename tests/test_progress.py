"""Progress and tables: what a person sees while waiting and afterwards."""

from __future__ import annotations

import io
import sys
import time

import pytest

from moec.progress import Lines, Silent, progress, show_progress
from moec.table import milliseconds, number, size, table


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_are_few_and_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines("bench", 3, every=60)
    for name in "abc":
        lines.step(name)
    out, err = capsys.readouterr()
    assert (out, err) == ("", "bench 1/3: a\n")
    always = Lines("bench", 2, every=0)
    always.step("a")
    always.step("b")
    assert capsys.readouterr().err == "bench 1/2: a\nbench 2/2: b\n"


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress("bench", 2) as shown:
        assert not isinstance(shown, Lines)
        shown.step("first")
        shown.step("second")
    assert "bench: second" in terminal.getvalue()
    assert "1/2" in terminal.getvalue()


def test_a_terminal_without_rich_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    for name in ("rich", "rich.console", "rich.progress"):
        monkeypatch.setitem(sys.modules, name, None)
    with progress("bench", 1) as shown:
        shown.step("first")
    assert terminal.getvalue() == "bench 1/1: first\n"


def test_quiet_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("bench", 1, quiet=True) as shown:
        assert isinstance(shown, Silent)
        shown.step("first")
    assert capsys.readouterr() == ("", "")


def test_table_aligns_columns() -> None:
    assert table(["name", "n"], [["a", "1"], ["long name", "100"]], right=["n"]).splitlines() == [
        "name         n",
        "---------  ---",
        "a            1",
        "long name  100",
    ]
    assert table(["name"], []) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.0, "0"), (1.3e-7, "1.3e-07"), (0.42, "0.42"), (12.34, "12.3"), (1532.4, "1532")],
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (512, "512 B"), (1536, "1.5 KiB"), (3 << 20, "3.0 MiB"), (5 << 40, "5.0 TiB")]
)
def test_sizes(value: int | None, text: str) -> None:
    assert size(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.1234, "0.123"), (4.567, "4.57"), (78.94, "78.9"), (1234.5, "1234")]
)
def test_milliseconds(value: float | None, text: str) -> None:
    assert milliseconds(value) == text


def test_a_library_call_shows_nothing_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress("compiling") as say:
        say("layers.0")
    assert capsys.readouterr() == ("", "")


def test_a_library_call_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with show_progress("compiling") as say, show_progress("inside") as other:
        say("layers.0")
        other("not lost in an error")
        time.sleep(0.2)
    assert "compiling" in terminal.getvalue()
    for name in ("rich", "rich.console", "rich.errors"):
        monkeypatch.setitem(sys.modules, name, None)
    terminal.truncate(0)
    with show_progress("compiling") as say:
        say("layers.0")
    assert terminal.getvalue().strip("\0") == "compiling: layers.0\n"
