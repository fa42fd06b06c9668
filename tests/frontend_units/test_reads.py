"""Which names a function reads, and which of them are variables of its own."""

from __future__ import annotations

import types
from typing import Any

import torch

import moec
from moec.frontends.torch.reads import names_in

SOURCE = """
import torch
from torch import nn

i = 1
LIMIT = 2


class FFN(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.times = 1

    def forward(self, x):
        for i in range(self.times):
            x = self.down(torch.relu(self.up(x))) if i < 5 else x
        return min(LIMIT, 2) * x / 2
"""


def test_variables_are_no_names_that_are_read() -> None:
    def around(self: Any, x: Any, i: int) -> Any:
        inner = x + i
        return [self.width, LIMIT, getattr(self, "depth"), *(inner for _ in range(i))]  # type: ignore[name-defined]  # noqa: B009, F821

    names = names_in(around.__code__)
    assert {"width", "LIMIT", "depth", "getattr", "range"} <= names
    assert names.isdisjoint({"self", "x", "i", "inner"})


def test_a_loop_of_the_users_own_is_not_taken_for_a_setting() -> None:
    """In a script or notebook, loops leave numbers behind under names that layers have for variables."""
    space = types.ModuleType("notebook")
    exec(SOURCE, vars(space))
    model = space.FFN().eval()
    fast = moec.compile(model, strict=True)
    x = torch.randn(3, 8)
    with torch.no_grad():
        vars(space)["i"] = 7
        assert torch.allclose(fast(x), model(x), atol=1e-6)
    assert fast.moec.report.layers[0].fallbacks == 0
