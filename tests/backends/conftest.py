"""The device that the tests of back ends make their tensors on: `MOEC_TEST_DEVICE=cuda` runs them on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from moec.backends.reference.executable import RegionExecutable


@pytest.fixture(autouse=True)
def _on_the_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every tensor that a test makes without naming a device is made there; a back end has to name it."""
    name = os.environ.get("MOEC_TEST_DEVICE")
    if name is None:
        yield
        return
    run = RegionExecutable.__call__

    def run_with_another_default(self: RegionExecutable, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.device("cpu"):
            return run(self, *inputs)

    monkeypatch.setattr(RegionExecutable, "__call__", run_with_another_default)
    with torch.device(name):
        yield
