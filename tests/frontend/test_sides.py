"""Weights on the experts' input and weights on their results are told apart where positive weights make both fit.

T tokens, K experts per token, E experts, D width.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moec
from tests.corpus.case import fill, random_tokens
from tests.frontend.modules import report_of

D, EXPERTS = 16, 5


class Bank(nn.Module):
    """Experts without biases and with relu: a positive factor goes through them unchanged."""

    def __init__(self, on_input: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.empty(EXPERTS, 24, D)), nn.Parameter(torch.empty(EXPERTS, D, 24))
        self.on_input = on_input

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            token, slot = torch.where(ids == e)
            factor = weights[token, slot, None]
            rows = x[token] * factor if self.on_input else x[token]
            y = F.linear(F.relu(F.linear(rows, self.up[e])), self.down[e])
            out.index_add_(0, token, y if self.on_input else y * factor)
        return out


class Block(nn.Module):
    def __init__(self, on_input: bool) -> None:
        super().__init__()
        self.experts, self.router = Bank(on_input), nn.Linear(D, EXPERTS)
        self.less = nn.Buffer(torch.zeros(()))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.router(x).softmax(-1).topk(2)
        return weights - self.less, ids

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        out: Tensor = self.experts(x, ids, weights)
        return out


class Written(Block):
    """The same with the experts' loop in the block, so that a slice is cut."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        return x + Bank.forward(self.experts, x, ids, weights)


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("kind", [Block, Written])
def test_negative_weights_go_where_they_went(kind: type[Block], on_input: bool) -> None:
    model = kind(on_input)
    fill(model)
    fast = moec.compile(model.eval())
    (layer,) = report_of(fast).layers
    assert (layer.kind, layer.status) == ("moe", "compiled"), layer.reason
    assert ("scale_rows" in layer.ir_before) is on_input
    model.less.fill_(1)  # every weight is negative from now on
    x = random_tokens(33, D)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    assert layer.fallbacks == 0


class TwoSided(Bank):
    """Negative weights act on the results, positive ones on the input: neither reading."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return super().forward(x, ids, weights) + 2 * super().forward(x, ids, weights.clamp(max=0))


def test_neither_side_is_refused_with_the_errors() -> None:
    model = Block(True)
    model.experts = TwoSided(True)
    fill(model)
    fast = moec.compile(model.eval())
    (layer,) = report_of(fast).layers
    assert layer.status == "left alone"
    model.less.fill_(1)
    x = random_tokens(33, D)
    with torch.no_grad():
        assert torch.equal(fast(x), model(x))
