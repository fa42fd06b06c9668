"""The command line: exit statuses, errors without tracebacks, JSON everywhere, nothing half-written."""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moec import cli
from moec.errors import MoecError
from moec.report import LayerReport, Report

FACTORIES = """
import torch
from torch import nn

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(self.a(x))

def pair():
    return Pair(), lambda tokens: torch.ones(1, tokens, 4)

def without_inputs():
    return Pair()

def nothing():
    return nn.LayerNorm(4), lambda tokens: torch.ones(1, tokens, 4)
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "factories.py"
    path.write_text(FACTORIES)
    return str(path)


def layers() -> list[LayerReport]:
    compiled = LayerReport("a", "ffn", "compiled", max_error=1e-7, evidence=("two linears",), ir_before="region a")
    return [compiled, LayerReport("b", "ffn", "left alone", reason="its activation is not known")]


@pytest.fixture
def fake_api(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """In place of moec.api: finds what `found` says, and keeps what it was asked."""
    fake = SimpleNamespace(found=layers(), asked={})

    def explain(model: Any, example_inputs: Any = None, **options: Any) -> Report:
        fake.asked = {"example_inputs": example_inputs, **options}
        return Report(layers=fake.found)

    def compile(model: Any, *, example_inputs: Any = None, **options: Any) -> Any:
        fake.asked = {"example_inputs": example_inputs, **options}
        twin = copy.deepcopy(model)
        twin.moec = SimpleNamespace(report=Report(layers=fake.found))
        return twin

    fake.explain, fake.compile = explain, compile
    monkeypatch.setitem(sys.modules, "moec.api", fake)
    monkeypatch.setattr("moec.api", fake, raising=False)
    return fake


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout, stderr."""
    try:
        status = cli.main(arguments)
    except SystemExit as left:
        status = int(left.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


BENCH = ("--seconds", "0", "--tokens", "1,3")


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


# --- env, passes, opt -------------------------------------------------------------------------------------------------


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


REGION = """region {name}(%x: f32[T, 4]) {{
  %w = weight {{ref="w"}} : f32[8, 4]
  %h = linear(%x, %w) : f32[T, 8]
  %a = act(%h) {{fn="silu"}} : f32[T, 8]
  %b = act(%h) {{fn="gelu"}} : f32[T, 8]
  return %a
}}
"""


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


# --- inspect ----------------------------------------------------------------------------------------------------------


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


# --- bench ------------------------------------------------------------------------------------------------------------


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


def test_the_installed_script_and_python_m_agree() -> None:
    outputs = []
    for command in ([sys.executable, "-m", "moec"], [os.path.join(os.path.dirname(sys.executable), "moec")]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
        outputs.append((done.returncode, done.stdout))
    assert outputs[0] == outputs[1] == (0, "moec 0.1.0\n")
