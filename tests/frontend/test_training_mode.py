"""training=True: compiled layers serve training mode where it is the same function, and say why where it is not."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moec

E, D, H, K = 4, 12, 16, 2


class Ffn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(F.gelu(self.up(x)))
        return y


class Block(nn.Module):
    """A mixture that knows no modes, but for its dropout."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(D, E), nn.ModuleList(Ffn() for _ in range(E))
        self.drop = nn.Dropout(p)
        self.register_buffer("seen", torch.zeros(()))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.router(x)
        return found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.logits(x).softmax(-1).topk(K, dim=-1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            tokens, choices = (ids == e).nonzero(as_tuple=True)
            if tokens.numel():
                y.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, choices, None])
        dropped: torch.Tensor = self.drop(y)
        return dropped


class Asking(Block):
    """Does something else in training mode, by `extra`."""

    def __init__(self, extra: str) -> None:
        super().__init__()
        self.extra = extra

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        logits = super().logits(x)
        if self.training and self.extra == "noise":
            logits = logits + torch.randn_like(logits)
        if self.training and self.extra == "scale":
            logits = logits * 2
        if self.training and self.extra == "count":
            self.get_buffer("seen").add_(1)
        if self.training and self.extra == "raise":
            raise RuntimeError("not trained like this")
        if self.training and self.extra == "gradient":
            logits = logits.detach()
        if self.training and self.extra == "many tokens" and len(x) > 4000:
            logits = logits * 2
        return logits


def step(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The result of a training step and all gradients."""
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_a_layer_that_is_the_same_serves_both_modes() -> None:
    model = Block().eval()
    fast = moec.compile(model, training=True)
    (layer,) = fast.moec.report.layers
    assert layer.compiled, layer.reason
    assert "the same function in training mode, which it serves too" in layer.evidence
    x = torch.randn(9, D)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine, theirs = step(fast.train(), x), step(model.train(), x)
    assert len(mine) == len(theirs) > E
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(mine, theirs, strict=True))
    assert layer.fallbacks == 0
    assert not any(m.training for m in fast.eval().modules())


def test_it_learns_as_the_original_does() -> None:
    torch.manual_seed(1)
    model = Block().eval()
    twin = Block().eval()
    twin.load_state_dict(model.state_dict())
    fast = moec.compile(model, training=True).train()
    x, wanted = torch.randn(32, D), torch.randn(32, D)
    losses = []
    for one in (fast, twin.train()):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.05)
        for _ in range(8):
            optimizer.zero_grad()
            loss = F.mse_loss(one(x), wanted)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert fast.moec.report.layers[0].fallbacks == 0


@pytest.mark.parametrize("extra", ["noise", "scale", "count", "raise", "gradient", "many tokens", "dropout"])
def test_a_layer_that_may_differ_runs_its_own_code(extra: str) -> None:
    model = (Block(0.5) if extra == "dropout" else Asking(extra)).eval()
    fast = moec.compile(model, training=True)
    layer: Any = next(one for one in fast.moec.report.layers if one.kind == "moe")
    assert layer.compiled, layer.reason
    assert any(line.startswith("its code asks for the mode (") for line in layer.evidence)
    x = torch.randn(5, D)
    with torch.no_grad():
        assert torch.allclose(fast(x), model(x), atol=1e-5)
    assert layer.fallbacks == 0
    assert not model.training
    assert not float(fast.get_buffer("seen"))
    fast.train()
    if extra == "raise":
        with pytest.raises(RuntimeError, match="not trained"), pytest.warns(UserWarning, match="MOEC231"):
            fast(x)
    else:
        with pytest.warns(UserWarning, match="training mode"):
            fast(x)
    assert layer.fallbacks == 1


def test_without_the_option_training_mode_is_the_originals() -> None:
    fast = moec.compile(Block().eval()).train()
    with pytest.warns(UserWarning, match="training mode"):
        fast(torch.randn(3, D))
