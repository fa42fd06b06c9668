"""The demo end to end on this machine."""

import json
from typing import Any

import pytest
import torch

from moec.demo.run import run
from moec.errors import MoecError


def as_data(capsys: pytest.CaptureFixture[str], **options: Any) -> dict[str, Any]:
    status = run(batch_sizes=(1, 2), seconds=0.02, json=True, **options)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert status == 0, found["problems"]
    return found


def test_screen_has_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(batch_sizes=(1, 2), seconds=0.02) == 0
    printed = capsys.readouterr().out
    for part in (
        "2 of 2 layers compiled",
        "IR of blocks.0.moe, as it was lifted",
        "grouped_linear",
        "Passes",
        "IR of blocks.0.moe, after the passes",
        "expert_ffn",
        "before    431   95.78 %",
        "after     431   95.78 %",
        "the same prediction for every image",
        "Latency of the whole model",
        "Every layer verified",
    ):
        assert part in printed


def test_json_has_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_data(capsys)
    assert found["ok"] is True
    (variant,) = found["variants"]
    assert [layer["name"] for layer in variant["report"]["layers"]] == ["blocks.0.moe", "blocks.1.moe"]
    for layer in variant["report"]["layers"]:
        assert (layer["kind"], layer["status"], layer["fallbacks"]) == ("moe", "compiled", 0)
        assert layer["max_error"] <= layer["bar"] <= 2e-6
        assert "expert_ffn" in layer["ir_after"]
        assert "expert_ffn" not in layer["ir_before"]
    assert variant["accuracy"]["right_before"] == variant["accuracy"]["right_after"] == 431
    assert variant["accuracy"]["changed"] == 0
    assert [(row["images"], row["tokens"]) for row in variant["latency"]] == [(1, 16), (2, 32)]


def test_int8_is_compiled_beside_the_exact_model(capsys: pytest.CaptureFixture[str]) -> None:
    exact, quantized = as_data(capsys, quantize="int8", pack=True)["variants"]
    assert (exact["call"], exact["exact"]) == ("moec.compile(model, pack=True)", True)
    assert (quantized["call"], quantized["exact"]) == ("moec.compile(model, quantize='int8', pack=True)", False)
    for layer in quantized["report"]["layers"]:
        assert 1e-4 < layer["numerics_error"] < 2e-2
    # Weight-only int8 changes the logits and hardly any prediction.
    assert 1e-4 < quantized["accuracy"]["logit_error"] < 2e-2
    assert abs(quantized["accuracy"]["right_after"] - 431) <= 2


def test_threads_hold_for_the_demo_only(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    assert as_data(capsys, threads=1)["threads"] == 1
    assert torch.get_num_threads() == before


def test_a_changed_prediction_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from moec.demo.model import DigitsMoE

    plain = DigitsMoE.forward

    def wrong(self: DigitsMoE, images: torch.Tensor) -> torch.Tensor:
        logits = plain(self, images)
        return logits.flip(-1) if hasattr(self, "moec") else logits

    monkeypatch.setattr(DigitsMoE, "forward", wrong)
    assert run(batch_sizes=(1,), seconds=0.02) == 3
    assert "FAILED: moec.compile(model): " in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [{"batch_sizes": ()}, {"batch_sizes": (4, 0)}, {"threads": 0}, {"quantize": "int3"}])
def test_wrong_options(wrong: dict[str, Any]) -> None:
    with pytest.raises(MoecError, match="MOEC502"):
        run(json=True, **wrong)
