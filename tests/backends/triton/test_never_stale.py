"""Copies and addresses that the back end holds never outlive what they were made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import moec

D, F = 32, 24


class Ffn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, F, bias=False), nn.Linear(F, D, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(nn.functional.relu(self.up(x)))
        return y


def write(model: Ffn) -> None:
    with torch.no_grad():
        model.up.weight.mul_(3)


def exchange(model: Ffn) -> None:
    model.up.weight.data = torch.randn_like(model.up.weight)


def replace(model: Ffn) -> None:
    model.down.weight = nn.Parameter(torch.randn_like(model.down.weight))


def load(model: Ffn) -> None:
    model.load_state_dict({name: torch.randn_like(p) for name, p in model.state_dict().items()})


def behind_the_back(model: Ffn) -> None:
    model.up.weight.data.mul_(2)
    moec.refresh(model)


@pytest.mark.parametrize("change", [write, exchange, replace, load, behind_the_back])
@pytest.mark.parametrize("options", [{}, {"pack": True}, {"quantize": "int8"}], ids=str)
def test_changes_show_on_the_next_call(
    change: Callable[[Ffn], None], options: dict[str, Any], device: torch.device
) -> None:
    fast = moec.compile(Ffn().eval().to(device), backend="triton", verify=False, **options)
    x = torch.randn(1, D, device=device)
    bar = 3e-2 if "quantize" in options else 1e-5
    with torch.no_grad():
        for _ in range(2):
            fast(x)
        change(fast)
        for given in (x, x, torch.randn(3, D, device=device)):
            wanted = Ffn.forward(fast, given)
            assert (fast(given) - wanted).norm() <= bar * wanted.norm()
    assert fast.moec.report.layers[0].fallbacks == 0


def test_a_narrowed_weight_is_noticed(device: torch.device) -> None:
    fast = moec.compile(Ffn().eval().to(device), backend="triton", verify=False)
    x = torch.randn(1, D, device=device)
    with torch.no_grad():
        fast(x)
        fast.up.weight.data = fast.up.weight.data[: F // 2]
        fast.down.weight.data = fast.down.weight.data[:, : F // 2]
        with pytest.warns(UserWarning, match="changed from shape"):
            found = fast(x)
        assert torch.equal(found, Ffn.forward(fast, x))
