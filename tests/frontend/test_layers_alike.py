"""Layers alike in one model: the search begins with what served the last one, and each is still verified by itself.

T tokens, K experts per token, E experts, D model width, F expert width.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moec
from moec.frontends.torch.observe import Driver

E, D, HIDDEN = 4, 12, 6


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.up(x)))
        return y


class Block(nn.Module):
    """x[B, S, D], or x[T, D] alone where `flat` -> the same; `odd` is no mixture."""

    def __init__(self, *, flat: bool = False, odd: bool = False) -> None:
        super().__init__()
        self.router = nn.Linear(D, E)
        self.experts = nn.ModuleList(Expert() for _ in range(E))
        self.flat, self.odd = flat, odd

    def forward(self, x: Tensor) -> Tensor:
        if self.flat and x.dim() != 2:
            raise ValueError("takes [T, D]")
        rows = x.reshape(-1, D)
        weights, chosen = self.router(rows).softmax(-1).topk(2)
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            out.index_add_(0, token, expert(rows[token]) * weights[token, slot, None])
        return (out + 0.1 * rows.mean() if self.odd else out).view_as(x)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int | None, int]]:
    """What each module was run on: its name, the tokens' width and rank."""
    found: list[tuple[str, int | None, int]] = []
    observe = Driver.observe

    def noted(self: Driver, *args: Any) -> Any:
        found.append((self.path, self.width, self.rank))
        return observe(self, *args)

    monkeypatch.setattr(Driver, "observe", noted)
    return found


def runs(tried: list[tuple[str, int | None, int]], name: str) -> list[tuple[int | None, int]]:
    """The tokens that a module was run on, without repetitions."""
    return list(dict.fromkeys((width, rank) for path, width, rank in tried if path == name))


def test_the_next_layer_is_run_on_what_served_the_last(tried: list[tuple[str, int | None, int]]) -> None:
    model = nn.Sequential(Block(), Block(), Block()).eval()
    fast = moec.compile(model, strict=True)
    assert len(runs(tried, "0")) > 1
    assert runs(tried, "1") == runs(tried, "2") == [(D, 3)]
    x = torch.randn(2, 9, D)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_layer_alike_that_needs_others_gets_them(tried: list[tuple[str, int | None, int]]) -> None:
    model = nn.Sequential(Block(), Block(flat=True)).eval()
    fast = moec.compile(model, strict=True)
    assert runs(tried, "1")[0] == (D, 3)
    assert runs(tried, "1")[-1] == (D, 2)
    x = torch.randn(9, D)
    with torch.no_grad():
        torch.testing.assert_close(fast[1](x), model[1](x), rtol=1e-5, atol=1e-5)


def test_a_layer_alike_that_computes_something_else_is_not_taken_for_the_last() -> None:
    model = nn.Sequential(Block(), Block(odd=True), Block()).eval()
    fast: Any = moec.compile(model)
    x = torch.randn(2, 9, D)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    probed = [layer.probes for layer in fast.moec.report.layers if layer.status == "compiled"]
    assert len(probed) >= 2
    assert all(probed)
