"""Routings that are easy to get wrong, and tensors with unusual strides. T tokens, K choices, E experts."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from tests.backends.running import DTYPES, FLOATS

each_float = pytest.mark.parametrize("dtype", [DTYPES[name] for name in FLOATS], ids=FLOATS)


@dataclass(frozen=True)
class Routing:
    """Ids that tokens chose."""

    name: str
    experts: int
    made: torch.Tensor

    @property
    def ids(self) -> torch.Tensor:
        """[T, K], on the device of the test."""
        return self.made.to(torch.get_default_device())


def _ids(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def routings() -> list[Routing]:
    """No tokens, one token, empty experts, all on one, strangers, repeated choices, a random crowd."""
    torch.manual_seed(3)
    return [
        Routing("no-tokens", 4, torch.zeros(0, 2, dtype=torch.int32)),
        Routing("one-token", 4, _ids([[2, 0]])),
        Routing("one-choice", 3, _ids([[2], [0], [2], [1], [0]])),
        Routing("one-expert", 1, _ids([[0], [0], [0]])),
        Routing("empty-experts", 7, _ids([[6, 1], [1, 6], [6, 1]])),
        Routing("all-to-the-last", 5, _ids([[4], [4], [4], [4]])),
        Routing("strangers", 3, _ids([[3, 0], [-1, 2], [2, 100], [-7, 3]])),
        Routing("strangers-only", 3, _ids([[3, -1], [5, 3]])),
        Routing("repeated-choices", 3, _ids([[1, 1], [0, 0], [2, 1], [1, 1]])),
        Routing("crowd", 9, torch.randint(-1, 10, (37, 3), dtype=torch.int32)),
        Routing("wide-ids", 5, torch.randint(0, 5, (13, 4), dtype=torch.int64)),
    ]


each_routing = pytest.mark.parametrize("routing", routings(), ids=lambda routing: routing.name)


def strided(x: torch.Tensor) -> list[torch.Tensor]:
    """The same values transposed in memory, every other column and row of a larger tensor, and behind an offset."""
    larger = torch.zeros(2 * x.shape[0] + 1, 2 * x.shape[1] + 1, dtype=x.dtype)
    larger[1::2, 1::2] = x
    wide = torch.cat([x, x], dim=1)
    return [x.T.contiguous().T, larger[1::2, 1::2], wide[:, x.shape[1] :]]


def some(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    """Random normal numbers."""
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype)
