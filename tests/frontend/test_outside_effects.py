"""A layer that changes something besides its result is left alone, by name, and compiling leaves no trace of it."""

from __future__ import annotations

import pickle
import random
import re
from typing import Any

import numpy as np
import pytest
import torch

import moec
from tests.frontend import outside
from tests.frontend.modules import agree
from tests.frontend.outside import EFFECTS, FFN, Mixture, made

X = torch.randn(2, 6, outside.D, generator=torch.Generator().manual_seed(1))


def state(model: Any) -> bytes:
    """Everything that the effects reach."""
    held = (model.losses.__dict__, model.slotted.count, model.slotted.seen, model.nested, model.running.tolist())
    more = (model.table.tolist(), list(model.deque), model.rng.getstate(), model.nprng.bit_generator.state)
    shared = (outside.SEEN, dict(outside.COUNTS), outside.TABLE.tolist(), outside.SHARED.__dict__, outside.CALLS)
    classes = (outside.Base.total, outside.Losses.latest, outside.with_default.__defaults__)
    counting: Any = EFFECTS["an enclosing function's variable"][0]
    cells = [cell.cell_contents for cell in counting.__closure__]
    random_state = (np.random.get_state(), random.getstate(), model.generator.get_state().tolist())
    return pickle.dumps((held, more, shared, classes, cells, random_state))


@pytest.mark.parametrize("kind", [Mixture, FFN])
@pytest.mark.parametrize("name", EFFECTS)
def test_it_is_left_alone_by_name(name: str, kind: type[outside.Base]) -> None:
    act, named = EFFECTS[name]
    model = made(kind, act)
    before = state(model)
    fast = moec.compile(model)
    assert state(model) == before == state(fast)
    (layer,) = fast.moec.report.layers
    assert layer.status == "left alone"
    assert re.search(named, layer.reason), layer.reason
    agree(fast, model, (X,), bar=0.0)
    assert state(model) != before


@pytest.mark.parametrize("kind", [Mixture, FFN])
def test_explaining_leaves_no_trace_either(kind: type[outside.Base]) -> None:
    model = made(kind, EFFECTS["a global list"][0])
    before = state(model)
    assert moec.explain(model, (X,)).layers[0].status == "left alone"
    assert state(model) == before


@pytest.mark.parametrize("kind", [Mixture, FFN])
def test_looking_is_no_effect(kind: type[outside.Base]) -> None:
    """Reading all of these does no harm."""

    def look(m: Any, x: Any) -> Any:
        held = len(m.losses.values), m.slotted.count, m.nested["a"]["b"][0], m.table.sum(), m.deque[0]
        return held, len(outside.SEEN), outside.COUNTS["a"], outside.SHARED.latest, outside.Base.total

    assert moec.compile(made(kind, look)).moec.report.layers[0].status == "compiled"
