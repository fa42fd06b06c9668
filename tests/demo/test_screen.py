"""The same words on a terminal with rich and in a log file."""

import io

import pytest

from moec.demo import show
from moec.demo.findings import Accuracy
from moec.demo.screen import Plain, Rich, open_screen, shades
from moec.report import LayerReport

IR = 'region moe "m"(%x: f32[T, 64]) {\n  %y = act(%x) {fn="silu"} : f32[T, 64]\n  return %y\n}'


def rich_screen(file: io.StringIO, *, color: bool = False) -> Rich:
    console = pytest.importorskip("rich.console").Console
    return Rich(console(file=file, width=80, highlight=False, force_terminal=color))


def test_plain_where_stdout_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    screen = open_screen()
    assert isinstance(screen, Plain)
    screen.code(IR)
    assert "  %y = act(%x)" in capsys.readouterr().out.splitlines()[1]


def test_rich_keeps_square_brackets_and_long_lines() -> None:
    file = io.StringIO()
    screen = rich_screen(file)
    screen.code(IR)
    screen.say("f32[T, 64] " * 20)
    lines = file.getvalue().splitlines()
    assert lines[1] == '    %y = act(%x) {fn="silu"} : f32[T, 64]'
    assert lines[4].count("f32[T, 64]") == 20


def test_rich_colours_a_diff() -> None:
    file = io.StringIO()
    rich_screen(file, color=True).diff("- old\n+ new")
    assert "\x1b[31m  - old" in file.getvalue()
    assert "\x1b[32m  + new" in file.getvalue()


def test_shades_fit_the_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, expected in (("ascii", " .:*#"), ("utf-8", " ░▒▓█")):
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        assert shades() == expected


def test_a_digit_and_its_experts(capsys: pytest.CaptureFixture[str]) -> None:
    image = [[0.0] * 7 + [1.0]] * 8
    show.digit(Plain(), image, 1, "m", [[patch % 8, 7 - patch % 8] for patch in range(16)])
    lines = capsys.readouterr().out.splitlines()[3:]
    assert len(lines) == 8
    assert lines[0].split()[1:] == ["0+7", "1+6", "2+5", "3+4"]
    assert len(lines[1].split()) == 1


def test_program_shows_what_passes_did_and_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    logs = (("first", (), (), ""), ("second", ("%y: fused",), ("%z: two readers",), "- %a\n+ %b"))
    layer = LayerReport("m", "moe", "compiled", ir_before=IR, ir_after=IR, pass_logs=logs, plan="one loop")
    show.program(Plain(), layer, lifted=True)
    printed = capsys.readouterr().out
    for text in (
        "as it was lifted",
        "first: nothing to do",
        "second: %y: fused",
        "left alone: %z: two readers",
        "+ %b",
    ):
        assert text in printed
    show.program(Plain(), layer, lifted=False)
    assert "as it was lifted" not in capsys.readouterr().out


@pytest.mark.parametrize("exact", [True, False])
def test_changed_predictions_are_told(exact: bool, capsys: pytest.CaptureFixture[str]) -> None:
    show.accuracy(Plain(), Accuracy(10, 9, 8, 1, 0.01), exact=exact)
    printed = capsys.readouterr().out
    assert "1 of 10 predictions changed" in printed
    assert "80.00 %" in printed
