"""What chooses the best of something and is no mixture stays untouched, with the reason."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch

from tests.onnx import near_misses, written
from tests.onnx.reading import refused

NO_EXPERTS = "the weights behind the choice are not two or three matrices for each expert"
NO_JOIN = "nothing that is computed from the choice comes together again"
OTHER_VALUES = "no reading of its weights and activations gives the recorded values"
NEAR_MISSES = {
    "Attends": NO_EXPERTS,
    "AttendsSparsely": NO_EXPERTS,
    "AttendsHard": NO_EXPERTS,
    "Classifies": NO_JOIN,
    "Samples": NO_JOIN,
    "LooksUp": NO_EXPERTS,
    "Beams": NO_JOIN,
    "Invited": OTHER_VALUES,
    "Normed": OTHER_VALUES,
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay_as_they_are(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = getattr(near_misses, name)()
    source = written.by_torch(model, torch.randn(7, 16), tmp_path / "in.onnx", "x")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert NEAR_MISSES[name] in refused("MOEC705", source, tmp_path / "out.onnx").message
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    onnxruntime.InferenceSession(str(source), providers=["CPUExecutionProvider"])
