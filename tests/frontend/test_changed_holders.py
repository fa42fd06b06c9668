"""Settings of submodules that only hold weights: the block's code reads them, and nobody calls them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moec

D, WIDE, E = 8, 12, 4


class Holder(nn.Module):
    """Weights of experts, or of one expert, with settings beside them."""

    def __init__(self, *lead: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(*lead, WIDE, D) / 3)
        self.down = nn.Parameter(torch.randn(*lead, D, WIDE) / 3)
        self.act: Any = F.silu
        self.scale = 1.5
        self.comment: Any = ""


class Stacked(nn.Module):
    """The holder has a name in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.held = nn.Linear(D, E), Holder(E)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            hidden = self.held.act(F.linear(x[token], self.held.up[e])) * self.held.scale
            out.index_add_(0, token, F.linear(hidden, self.held.down[e]) * weights[token, slot, None])
        return out


class Listed(nn.Module):
    """The holders are elements of a list."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.held = nn.Linear(D, E), nn.ModuleList(Holder() for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for e in range(E):
            one: Any = self.held[e]
            token, slot = torch.where(ids == e)
            hidden = one.act(F.linear(x[token], one.up)) * one.scale
            out.index_add_(0, token, F.linear(hidden, one.down) * weights[token, slot, None])
        return out


def number(model: Any) -> None:
    for part in model.modules():
        if isinstance(part, Holder):
            part.scale = 4.0


def function(model: Any) -> None:
    for part in model.modules():
        if isinstance(part, Holder):
            part.act = torch.tanh


def unread(model: Any) -> None:
    for part in model.modules():
        if isinstance(part, Holder):
            part.comment = "new"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [Stacked, Listed])
@pytest.mark.parametrize(("change", "name"), [(number, "scale"), (function, "act"), (unread, "")])
def test_settings_beside_weights_are_followed(kind: type[nn.Module], change: Callable[[Any], None], name: str) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    original = kind().eval()
    original.load_state_dict(model.state_dict())
    x = torch.randn(9, D)
    fast = moec.compile(model, example_inputs=(x,))
    layer = fast.moec.report.layers[0]
    assert layer.status == "compiled"
    with torch.no_grad():
        assert torch.allclose(fast(x), original(x), atol=1e-5)
        assert not layer.fallback_reasons
        before = original(x)
        change(fast)
        change(original)
        assert torch.allclose(fast(x), original(x), atol=1e-5)
        assert torch.allclose(before, original(x)) == (not name)
    assert all(f"'{name}' of held" in reason for reason in layer.fallback_reasons)
    assert bool(layer.fallback_reasons) == bool(name)


class Dropping(Stacked):
    """The holder's mode decides about a dropout."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.5, self.held.training))


@pytest.mark.filterwarnings("ignore")
def test_the_mode_of_a_submodule_that_is_not_called_is_followed() -> None:
    torch.manual_seed(0)
    x = torch.randn(9, D)
    fast = moec.compile(Dropping().eval(), example_inputs=(x,))
    layer = fast.moec.report.layers[0]
    assert layer.status == "compiled"
    with torch.no_grad():
        before = fast(x)
        assert not layer.fallback_reasons
        fast.held.train()
        assert not torch.allclose(fast(x), before)
        assert list(layer.fallback_reasons) == ["'training' of held is True, it was False when compiled"]
        fast.held.eval()
        assert torch.equal(fast(x), before)
