"""A layer with a stand-in for its compiled method, for tests of what stands in a live model.

D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moec.frontends.torch.install import install
from moec.frontends.torch.method import CompiledMethod
from moec.report import LayerReport
from moec.weights import View, WeightStore
from tests.frontend_units.build import rand

D = 4


class Layer(nn.Module):
    """x -> (inner(x) * scale, a number, an integer tensor)"""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)
        # A counter that nobody watches: a number would be a setting that has changed.
        self.counter = torch.zeros((), dtype=torch.int64)

    @property
    def ran(self) -> int:
        return int(self.counter)

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, float, Tensor]:
        self.counter.add_(1)
        y: Tensor = self.inner(x)
        return y.tanh() * scale, scale, torch.arange(3)


class Call:
    """Computes the same through an executable, and counts; raises what it is told to."""

    dtype = torch.float32

    def __init__(self) -> None:
        self.ran = 0
        self.error: Exception | None = None

    def __call__(
        self, module: nn.Module, executable: Callable[..., tuple[Tensor, ...]], args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        if self.error is not None:
            raise self.error
        self.ran += 1
        scale = kwargs.get("scale", args[1] if len(args) > 1 else 1.0)
        (y,) = executable(args[0])
        return y * scale, scale, torch.arange(3)


def store(module: nn.Module) -> WeightStore:
    return WeightStore(module, {"w": View("inner.weight", 0, (D, D), (D, 1)), "b": View("inner.bias", 0, (D,), (1,))})


def build(weights: WeightStore) -> Callable[..., tuple[Tensor, ...]]:
    return lambda x: (torch.tanh(nn.functional.linear(x, weights.dense("w"), weights.dense("b"))),)


class Installed:
    def __init__(self, *, strict: bool = False) -> None:
        self.module, self.call = Layer().eval(), Call()
        self.report = LayerReport(name="mlp", kind="moe", status="compiled")
        self.method = CompiledMethod(self.module, "forward", self.call, store, build, self.report, ("inner",), strict)
        self.method.ready()
        install(self.method)

    def ran(self) -> tuple[int, int]:
        """(compiled, original) calls"""
        return self.call.ran, self.module.ran


X = rand(3, D)
