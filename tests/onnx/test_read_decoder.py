"""Decoders with caches of keys and values as inputs, as onnxruntime-genai builds them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import moec
from tests.onnx.decoder import HEAD, PAIRS, V, decoder
from tests.onnx.reading import outputs


@pytest.mark.parametrize("before", [0, 4])
def test_a_decoder_with_caches(before: int, tmp_path: Path) -> None:
    """Made-up caches are empty; the file then goes on from full ones. No value of the experts meets their limit."""
    source, out = decoder(tmp_path / "in.onnx"), tmp_path / "out.onnx"
    report = moec.export(source, out)
    assert [layer.status for layer in report.layers] == ["rewritten"]
    assert "clamped at 7" in report.layers[0].evidence[1]
    assert "past_sequence_length=0" in report.whole_model_shapes[0]
    random, tokens = np.random.default_rng(0), 1 if before else 5
    past = random.standard_normal((2, 2, PAIRS, before, HEAD)).astype(np.float32)
    feed = {
        "input_ids": random.integers(0, V, (2, tokens)),
        "attention_mask": np.ones((2, before + tokens), np.int64),
        "past_key_values.0.key": past[0],
        "past_key_values.0.value": past[1],
    }
    for mine, theirs in zip(outputs(out, feed), outputs(source, feed), strict=True):
        assert np.linalg.norm(mine - theirs) <= 2e-6 * np.linalg.norm(theirs)
