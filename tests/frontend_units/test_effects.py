"""Each thing a run changes besides its result is named, and put back."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moec.frontends.torch.effects import Watch


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("count", torch.zeros(2))
        self.count: Tensor
        self.calls = 0
        self.seen: list[int] = [1]
        self.table: dict[str, int] = {"a": 1}
        self.names = {"x"}
        self.constant = torch.tensor(2.0)


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Counting()


def replace_buffer(m: Any, x: Tensor) -> None:
    m.inner.count = m.inner.count + 1


def set_item(m: Any, x: Tensor) -> None:
    m.inner.table["a"] = 2


def write_parameter(m: Any, x: Tensor) -> None:
    with torch.no_grad():
        m.inner.weight.add_(1)


EFFECTS: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "torch's random numbers": (lambda m, x: torch.rand(1), "draws random numbers"),
    "dropout": (lambda m, x: torch.nn.functional.dropout(x, 0.5, training=True), "draws random numbers"),
    "Python's random numbers": (lambda m, x: random.random(), "draws random numbers"),
    "the input": (lambda m, x: x.mul_(2), "changes its input in place"),
    "a view of the input": (lambda m, x: x[0].zero_(), "changes its input in place"),
    "a parameter": (write_parameter, "changes parameter 'inner.weight'"),
    "a buffer": (lambda m, x: m.inner.count.add_(1), "changes buffer 'inner.count'"),
    "a buffer's object": (replace_buffer, "replaces buffer 'inner.count'"),
    "a number": (lambda m, x: setattr(m.inner, "calls", 1), "sets attribute 'inner.calls'"),
    "a new attribute": (lambda m, x: setattr(m, "aux_loss", x.sum()), "sets attribute 'aux_loss'"),
    "a tensor attribute": (lambda m, x: setattr(m.inner, "constant", x), "sets attribute 'inner.constant'"),
    "a list": (lambda m, x: m.inner.seen.append(2), "sets attribute 'inner.seen'"),
    "a dictionary": (set_item, "sets attribute 'inner.table'"),
    "a set": (lambda m, x: m.inner.names.add("y"), "sets attribute 'inner.names'"),
}
UNDONE = {name for name in EFFECTS if "input" not in name and name != "a parameter"}


@pytest.mark.parametrize("what", EFFECTS)
def test_an_effect_is_named(what: str) -> None:
    module, x = Holder(), torch.ones(2, 3)
    act, phrase = EFFECTS[what]
    watch = Watch(module, [x])
    assert watch.changes() == []
    act(module, x)
    assert watch.changes() == [phrase]


@pytest.mark.parametrize("what", sorted(UNDONE))
def test_an_effect_is_undone(what: str) -> None:
    module, x = Holder(), torch.ones(2, 3)
    torch.manual_seed(3)
    random.seed(3)
    before = torch.get_rng_state(), random.getstate(), module.inner.count
    watch = Watch(module, [x])
    EFFECTS[what][0](module, x)
    watch.undo()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert module.inner.count is before[2]
    assert module.inner.count.tolist() == [0, 0]
    assert (module.inner.calls, module.inner.seen, module.inner.table, module.inner.names) == (0, [1], {"a": 1}, {"x"})
    assert module.inner.constant.item() == 2
    assert "aux_loss" not in module.__dict__


def test_a_pure_run_has_no_effects() -> None:
    module, x = Holder(), torch.ones(2, 3)
    watch = Watch(module, [x])
    y = (x * module.inner.weight).relu() + module.inner.count.sum()
    y.add_(1)
    module.inner.calls = 0
    assert watch.changes() == []


def test_several_effects_are_all_named() -> None:
    module, x = Holder(), torch.ones(2, 3)
    watch = Watch(module, [x])
    x.add_(1)
    module.inner.count.add_(1)
    module.inner.calls += 1
    assert len(watch.changes()) == 3
