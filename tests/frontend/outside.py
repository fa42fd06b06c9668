"""Layers that leave something behind outside of their results: in objects, classes, globals and generators.

D width, F hidden width, E experts.
"""

from __future__ import annotations

import collections
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

D, WIDE, E = 8, 12, 3
SEEN: list[int] = []
COUNTS = collections.Counter[str]()
TABLE = np.zeros(2)
CALLS = 0


class Losses:
    """A collector that layers share."""

    latest: float = 0.0

    def __init__(self) -> None:
        self.values: list[float] = []
        self.by_kind: dict[str, list[float]] = {"aux": []}

    def add(self, value: float) -> None:
        self.values.append(value)


@dataclass(slots=True)
class Slotted:
    """Has no `__dict__`."""

    count: int = 0
    seen: list[int] = field(default_factory=list)


SHARED = Losses()


class Base(nn.Module):
    """Top-2 of E experts, or an FFN; `act` is what it does besides."""

    total = 0

    def __init__(self, act: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.losses, self.slotted = Losses(), Slotted()
        self.nested: dict[str, Any] = {"a": {"b": [1]}}
        self.running = torch.zeros(2)
        self.table = np.zeros(2)
        self.rng, self.generator, self.nprng = random.Random(3), torch.Generator(), np.random.default_rng(3)
        self.deque = collections.deque([1, 2], maxlen=2)
        self.act = act
        self.log = SHARED.values.append


class Mixture(Base):
    def __init__(self, act: Callable[[Any, Tensor], Any]) -> None:
        super().__init__(act)
        self.router = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, WIDE), nn.ReLU(), nn.Linear(WIDE, D)) for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, D)
        weights, ids = self.router(rows).softmax(-1).topk(2)
        self.act(self, rows)
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(rows[token]) * weights[token, slot, None])
        return out.view_as(x)


class FFN(Base):
    def __init__(self, act: Callable[[Any, Tensor], Any]) -> None:
        super().__init__(act)
        self.up, self.down = nn.Linear(D, WIDE), nn.Linear(WIDE, D)

    def forward(self, x: Tensor) -> Tensor:
        self.act(self, x)
        y: Tensor = self.down(self.up(x).relu())
        return y


def made(kind: type[Base], act: Callable[[Any, Tensor], Any]) -> Any:
    torch.manual_seed(3)
    return kind(act).eval()


def count_global(m: Any, x: Tensor) -> None:
    global CALLS  # noqa: PLW0603 - the effect under test
    CALLS += 1


def write_class(m: Any, x: Tensor) -> None:
    Base.total += 1


def write_class_of_a_collector(m: Any, x: Tensor) -> None:
    Losses.latest = float(x.shape[0])


def counting() -> Callable[[Any, Tensor], Any]:
    calls = 0

    def act(m: Any, x: Tensor) -> None:
        nonlocal calls
        calls += 1

    return act


def with_default(m: Any, x: Tensor, seen: list[int] = []) -> None:  # noqa: B006 - on purpose
    seen.append(1)


EFFECTS: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "an object's list": (lambda m, x: m.losses.add(1.0), "'losses.values'"),
    "an object's attribute": (lambda m, x: setattr(m.losses, "latest", 1.0), "'losses.latest'"),
    "an object's dict of lists": (lambda m, x: m.losses.by_kind["aux"].append(1.0), r"losses\.by_kind\['aux'\]"),
    "an object with slots": (lambda m, x: setattr(m.slotted, "count", 1), r"slotted\.count"),
    "a list of an object with slots": (lambda m, x: m.slotted.seen.append(1), r"slotted\.seen"),
    "a nested container": (lambda m, x: m.nested["a"]["b"].append(2), r"nested\['a'\]\['b'\]"),
    "a plain tensor": (lambda m, x: m.running.add_(1), "'running'"),
    "an array": (lambda m, x: m.table.__iadd__(1), "'table'"),
    "a deque": (lambda m, x: m.deque.append(3), "'deque'"),
    "a bound method": (lambda m, x: m.log(1.0), "'log'|SHARED"),
    "a generator of Python": (lambda m, x: m.rng.random(), "'rng'"),
    "a generator of torch": (lambda m, x: torch.rand(1, generator=m.generator), "'generator'"),
    "a generator of numpy": (lambda m, x: m.nprng.random(), "'nprng'"),
    "numpy's random numbers": (lambda m, x: np.random.rand(), "numpy.random"),
    "a global list": (lambda m, x: SEEN.append(1), r"global 'tests\.frontend\.outside\.SEEN"),
    "a global counter": (lambda m, x: COUNTS.update("a"), r"outside\.COUNTS"),
    "a global array": (lambda m, x: TABLE.__iadd__(1), r"outside\.TABLE"),
    "a global object": (lambda m, x: SHARED.add(1.0), r"outside\.SHARED\.values|'log'"),
    "a global number": (count_global, r"outside\.CALLS"),
    "a class attribute": (write_class, r"class attribute 'Base\.total'"),
    "another class's attribute": (write_class_of_a_collector, r"class attribute 'Losses\.latest'"),
    "an enclosing function's variable": (counting(), "enclosing function's variable 'calls'"),
    "a default argument": (with_default, "default argument of 'with_default"),
}
