"""A file of model factories, and a compiler that finds what a test says."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moec.report import Report
from tests.cli.running import layers

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
