"""Small MoE layers with settings of every kind that a user may change after compiling.

T tokens, K experts a token, E experts, D width, F hidden width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.frontend import elsewhere

D, WIDE, E = 8, 12, 4
FACTOR = 1.0


class Settings:
    """A class as a place for settings."""

    shift = 0.0


def halved(x: Tensor) -> Tensor:
    return F.silu(x) / 2


def renormalise(weights: Tensor) -> Tensor:
    return weights * FACTOR


class Expert(nn.Module):
    """An activation that is a function, one that is a module, and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, WIDE), nn.Linear(WIDE, D)
        self.act: Callable[[Tensor], Tensor] = F.silu
        self.out: nn.Module = nn.Identity()
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.down(self.act(self.up(x))))
        return y * self.scale


class Sliced(nn.Module):
    """Router, experts and settings in one block."""

    renormalise = True
    temperature = 1.0

    def __init__(self, num_experts: int = E) -> None:
        super().__init__()
        self.router = nn.Linear(D, num_experts, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(num_experts))
        self.drop = nn.Dropout(0.5)
        self.before: nn.Module = nn.Identity()
        self.top_k = 2
        self.config = SimpleNamespace(norm_topk_prob=True, bias=0.0)
        self.factors = [1.0, 1.0]
        self.finish: Any = functools.partial(torch.mul, other=1.0)

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = (self.router(self.before(rows)) / self.temperature).softmax(-1).topk(self.top_k)
        if self.config.norm_topk_prob and getattr(self, "renormalise"):  # noqa: B009 - read by name on purpose
            weights = weights / weights.sum(-1, keepdim=True)
        return renormalise(weights) * self.factors[0] + Settings.shift + elsewhere.SHIFT, ids

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, D)
        weights, ids = self.route(rows)
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(rows[token]) * weights[token, slot, None])
        y: Tensor = self.finish(self.drop(out)).view_as(x)
        return y


class Experts(nn.Module):
    """Stacked experts behind a call of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(E, WIDE, D)), nn.Parameter(torch.randn(E, D, WIDE))
        self.act: Callable[[Tensor], Tensor] = F.silu
        self.act_module: nn.Module = nn.Identity()
        self.config = SimpleNamespace(scale=1.0)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            token, slot = torch.where(ids == e)
            hidden = self.act_module(self.act(F.linear(x[token], self.up[e])))
            out.index_add_(0, token, F.linear(hidden, self.down[e]) * weights[token, slot, None])
        scale: float = self.config.scale
        return out * scale


class Direct(nn.Module):
    """A router beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E, bias=False)
        self.experts = Experts()
        self.top_k = 2

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, D)
        weights, ids = self.router(rows).softmax(-1).topk(self.top_k)
        y: Tensor = self.experts(rows, ids, weights).view_as(x)
        return y


class Plain(nn.Module):
    """An FFN with a multiplier and a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(D, WIDE), nn.GELU(), nn.Linear(WIDE, D)
        self.drop = nn.Dropout(0.5)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.drop(self.down(self.act(self.up(x))))
        return y * self.scale


def made(kind: type[nn.Module], **options: Any) -> Any:
    torch.manual_seed(3)
    return kind(**options).eval()
