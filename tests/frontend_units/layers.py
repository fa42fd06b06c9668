"""Small MoE layers written in different ways, with the evaluation of what the front end made of them.

B sequences, S positions, T tokens, K experts per token, E experts, D width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moec.frontends.torch.analyse import Analysis, analyse
from moec.frontends.torch.lifted import Lifted
from tests.frontend_units.build import params_of, rand

E, K, D, WIDE = 4, 2, 6, 5
Routed = Callable[[Any, Tensor, Tensor], Any]


def ignore(text: str) -> None:
    """Progress nobody watches."""


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, WIDE, bias=False), nn.Linear(WIDE, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.up(x)))
        return y


def mix(experts: Sequence[nn.Module] | nn.ModuleList, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """y_t = sum of w[t, k] * f_{e[t, k]}(x_t) by a loop over experts."""
    out = torch.zeros_like(x)
    for e, expert in enumerate(experts):
        token, slot = torch.where(index == e)
        if len(token):
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
    return out


class Inner(nn.Module):
    """Experts behind a call of their own, in the convention that `takes` defines."""

    def __init__(self, takes: Callable[..., Tensor]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert() for _ in range(E))
        self.__dict__["takes"] = takes

    def forward(self, x: Tensor, *routing: Any, **named: Any) -> Tensor:
        y: Tensor = self.__dict__["takes"](self.experts, x, *routing, **named)
        return y


class Block(nn.Module):
    """A router, and `body(self, x, logits)` for everything else; x is [B, S, D]."""

    def __init__(self, body: Routed, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.router = nn.Linear(D, E, bias=False)
        if inner is None:
            self.experts = nn.ModuleList(Expert() for _ in range(E))
        else:
            self.inner = inner
        self.__dict__["body"] = body

    def forward(self, x: Tensor) -> Any:
        rows = x.reshape(-1, D)
        y = self.__dict__["body"](self, rows, self.router(rows))
        return y.view(x.shape) if isinstance(y, Tensor) else y


class Outer(nn.Module):
    """A block inside a model, so that names have a path."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.mlp = block

    def forward(self, x: Tensor) -> Any:
        return self.mlp(x)


def top(logits: Tensor) -> tuple[Tensor, Tensor]:
    """index [T, K], weights [T, K]"""
    weights, index = logits.softmax(-1).topk(K, dim=-1)
    return index, weights / weights.sum(-1, keepdim=True)


def made(block: nn.Module) -> nn.Module:
    """The block in a model, in eval mode, with weights that are the same on every run."""
    model = Outer(block)
    for i, p in enumerate(model.parameters()):
        p.data.copy_(rand(*p.shape, seed=i) * 0.5)
    return model.eval()


def analysed(model: nn.Module) -> Analysis:
    with torch.no_grad():
        return analyse(model, None, ignore)


def lifted(model: nn.Module) -> Lifted:
    """The one layer that was found; nothing was refused."""
    found = analysed(model)
    assert [r.reason for r in found.refused] == []
    (layer,) = found.lifted
    return layer


def refusal(model: nn.Module) -> str:
    """Why the one candidate was left alone."""
    found = analysed(model)
    assert found.lifted == []
    return found.refused[0].reason


def evaluated(layer: Lifted, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The layer's result with its experts evaluated by the front end's own formula."""
    params = params_of(model)

    def exact(rows: Tensor, *routing: Tensor) -> tuple[Tensor, ...]:
        if not routing:
            return (layer.body.expert(params, 0, rows),)
        on_input = getattr(getattr(layer.call, "roles", None), "on_input", False)
        return (layer.body.evaluate(params, rows, *routing, on_input=on_input),)

    with torch.no_grad():
        return layer.call(layer.module, exact, args, kwargs)
