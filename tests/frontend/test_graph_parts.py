"""Which parts of graphs are closed, and what happens to those that are not.

B sequences, S tokens a sequence, D width, E experts, K experts a token.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import moec
from moec import MoecError
from tests.frontend.graph_inputs import Batched, D, layers_in
from tests.frontend.test_callers import agrees

pytestmark = pytest.mark.filterwarnings("ignore")


class Leaking(Batched):
    """What one expert's product gives is used outside of the layer."""

    def forward(self, x: Tensor) -> Any:
        rows = x.reshape(-1, D)
        weights, ids = self.route(rows)
        hidden = torch.einsum("td,tkhd->tkh", rows, self.gate_up[ids])
        gate, up = hidden.chunk(2, -1)
        y = torch.einsum("tkh,tkdh->tkd", F.silu(gate) * up, self.down[ids])
        return (y * weights[..., None]).sum(1).reshape(x.shape), hidden.mean()


class Overwritten(Batched):
    """The input is changed in place between the router and the experts."""

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        found = super().route(rows)
        rows.mul_(2)
        return found


class OverwrittenLater(Batched):
    """The input is changed in place when it is no longer read."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        x.mul_(2)
        return y


class WithDropout(Batched):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(self.drop(x) + 0 * x)
        return y


@pytest.mark.parametrize("kind", [Leaking, Overwritten])
def test_parts_that_are_not_closed_are_left_alone(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(D), kind()).eval()
    fast = moec.compile(fx.symbolic_trace(model), example_inputs=(torch.randn(2, 5, D),))
    x = torch.randn(3, 7, D)
    agrees(fast(x.clone()), model(x.clone()))
    assert layers_in(fast.graph) == 0
    assert all(layer.reason for layer in fast.moec.report.layers)


def test_writes_behind_a_part_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(OverwrittenLater()).eval()
    fast = moec.compile(fx.symbolic_trace(model), example_inputs=(torch.randn(2, 5, D),))
    mine = torch.randn(3, 7, D)
    theirs = mine.clone()
    agrees(fast(mine), model(theirs))
    agrees(mine, theirs)


def test_training_mode_of_modules_in_a_part() -> None:
    """A dropout inside of the layer keeps it from being written anew; one in front of it stays where it is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(D), WithDropout()).eval()
    fast = moec.compile(fx.symbolic_trace(model), example_inputs=(torch.randn(2, 5, D),))
    x = torch.randn(3, 7, D)
    agrees(fast(x), model(x))
    for m in (fast, model):
        m.train()
    torch.manual_seed(3)
    mine = fast(x)
    torch.manual_seed(3)
    agrees(mine, model(x))


def test_strict() -> None:
    model = nn.Sequential(nn.LayerNorm(D), Leaking()).eval()
    with pytest.raises(MoecError) as told:
        moec.compile(fx.symbolic_trace(model), example_inputs=(torch.randn(2, 5, D),), strict=True)
    assert told.value.code == "MOEC220"
