"""Regions through ONNX Runtime beside the reference. T tokens, K choices, E experts."""

from __future__ import annotations

import pytest
import torch

from moec.backendbase import load_backend
from moec.ir import Region
from tests.backends.running import Weights

pytest.importorskip("onnxruntime")

# Relative to the largest number of the result. ONNX Runtime's sigmoid is off by up to 1e-7 in absolute terms.
CLOSE = {torch.float64: 1e-6, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def both(region: Region, inputs: list[torch.Tensor], weights: Weights | None = None, bar: float | None = None) -> None:
    """Run a region both ways and compare all its results."""
    held = (weights or Weights()).store()
    theirs = load_backend("reference").build(region, held, {})(*inputs)
    mine = load_backend("onnxruntime").build(region, held, {})(*inputs)
    for a, b in zip(mine, theirs, strict=True):
        check_near(a, b, bar)


def check_near(mine: torch.Tensor, theirs: torch.Tensor, bar: float | None = None) -> None:
    """Equal integers; floating point within the bar, and not-a-numbers in the same places."""
    assert mine.dtype == theirs.dtype
    assert mine.shape == theirs.shape
    if not theirs.is_floating_point():
        assert torch.equal(mine, theirs)
        return
    a, b = mine.double(), theirs.double()
    assert torch.equal(a.isnan(), b.isnan())
    held = ~b.isnan() & ~b.isinf()
    largest = float(b[held].abs().max()) if bool(held.any()) else 1.0
    gap = float((a - b)[held].abs().max()) if bool(held.any()) else 0.0
    assert gap <= (bar or CLOSE[theirs.dtype]) * max(largest, 1e-30), f"{gap:.2e} apart, the largest is {largest:.2e}"
