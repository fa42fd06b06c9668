"""The command line on real models, through the real compiler."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

import moec
from moec import cli

MODULE = """
import torch
from torch import nn

class Moe(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(16, 4, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(4)
        )

    def forward(self, x):
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            out[token] += weights[token, slot, None] * expert(x[token])
        return out

def moe():
    torch.manual_seed(0)
    return Moe()

def with_inputs():
    return moe(), lambda tokens: torch.randn(tokens, 16)

def plain():
    return nn.Sequential(nn.LayerNorm(16), nn.Tanh()), lambda tokens: torch.randn(tokens, 16)

def trigram():
    return nn.Embedding(10, 4)
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "models.py"
    path.write_text(MODULE)
    return str(path)


def fits(text: str, name: str) -> None:
    schema = json.loads((Path(moec.__file__).parent / f"{name}.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))


def test_inspect(capsys: pytest.CaptureFixture[str], file: str) -> None:
    assert cli.main(["inspect", f"{file}:with_inputs", "--json"]) == 0
    out = capsys.readouterr().out
    fits(out, "report")
    (layer,) = (layer for layer in json.loads(out)["layers"] if layer["kind"] == "moe")
    assert layer["status"] == "compiled"
    assert layer["max_error"] <= layer["bar"]
    assert layer["evidence"]
    assert "expert_ffn" in layer["ir_after"]


@pytest.mark.parametrize("factory", ["with_inputs", "moe"])
def test_bench(capsys: pytest.CaptureFixture[str], file: str, tmp_path: Path, factory: str) -> None:
    page = tmp_path / "bench.html"
    arguments = ["bench", f"{file}:{factory}", "--tokens", "1,6", "--seconds", "0", "--json", "--html", str(page)]
    assert cli.main([*arguments, "--pack"]) == 0
    out = capsys.readouterr().out
    fits(out, "bench")
    read = json.loads(out)
    assert [(row["kind"], row["tokens"]) for row in read["rows"]] == [("moe", 1), ("moe", 6)]
    assert all(row["before"]["median_ms"] > 0 and row["after"]["median_ms"] > 0 for row in read["rows"])
    assert read["settings"]["pack"] is True
    assert not read["notes"], "no call may fall back"
    assert "<svg" in page.read_text()


@pytest.mark.parametrize("factory", ["plain", "trigram"])
@pytest.mark.parametrize("command", ["inspect", "bench"])
def test_nothing_matched(capsys: pytest.CaptureFixture[str], file: str, command: str, factory: str) -> None:
    assert cli.main([command, f"{file}:{factory}"]) == 4
    assert "no MoE or FFN layer found" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "status", "code"),
    [
        (["--backend", "trton"], 1, "MOEC502"),
        (["--backend", "triton"], 1, "MOEC408"),
        (["--passes", "fuse-expert"], 1, "MOEC301"),
    ],
)
def test_options_that_cannot_be(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    option: list[str],
    status: int,
    code: str,
) -> None:
    # With it kernels run on CPU tensors.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert cli.main(["bench", f"{file}:moe", *option]) == status
    assert capsys.readouterr().err.startswith(f"[{code}]")


def test_a_transformers_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = {
        "model_type": "mixtral",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "vocab_size": 50,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["bench", str(tmp_path), "--tokens", "3", "--seconds", "0", "--json", "--dtype", "bf16"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert [(row["kind"], row["tokens"], len(row["like"])) for row in read["rows"]] == [("moe", 3, 1), ("model", 3, 0)]
    assert read["settings"]["dtype"] == "bfloat16"
