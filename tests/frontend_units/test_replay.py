"""Replaying a part of a log with other values gives what the code would have computed, and changes nothing recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moec.frontends.torch import oplog
from moec.frontends.torch.replay import replay
from tests.frontend_units.build import given, log_of, rand, result, value


def compute(m: Any, x: Tensor, y: Tensor) -> Tensor:
    h = (x * 2).clamp(max=1.5)
    if h.sum().item() > 1e9:
        return h
    h.add_(y)
    first, second = h.chunk(2, dim=-1)
    return torch.cat([second, first], dim=-1)


def test_a_given_value_goes_through_the_recorded_ops() -> None:
    x, y, other = rand(3, 4), rand(3, 4, seed=1), rand(3, 4, seed=2)
    log = log_of(compute, x, y)
    mine = replay(log, range(len(log.entries)), {given(log): other}, result(log))
    assert torch.equal(mine, compute(None, other, y))


def test_what_is_not_given_is_as_recorded() -> None:
    x, y = rand(3, 4), rand(3, 4, seed=1)
    log = log_of(compute, x, y)
    assert torch.equal(replay(log, range(len(log.entries)), {}, result(log)), compute(None, x, y))


def test_a_part_reads_what_was_recorded_before_it() -> None:
    log = log_of(lambda m, x: ((x + 1) * 2).exp(), rand(3))
    assert torch.equal(replay(log, [1, 2], {}, result(log)), ((rand(3) + 1) * 2).exp())
    middle = log.entries[0].results[0]
    assert torch.equal(replay(log, [1, 2], {middle: torch.ones(3)}, result(log)), (torch.ones(3) * 2).exp())


def test_writing_ops_of_a_replay_leave_the_recorded_values() -> None:
    def write(m: Any, x: Tensor) -> Tensor:
        y = x.clone()
        return y.mul_(3)

    log = log_of(write, rand(3))
    before = value(log, result(log)).clone()
    for _ in range(2):
        assert torch.equal(replay(log, [1], {}, result(log)), rand(3) * 3)
    assert torch.equal(value(log, result(log)), before)


def test_another_size_serves_where_the_ops_allow_it() -> None:
    log = log_of(lambda m, x: torch.relu(x) + 1, rand(3))
    assert torch.equal(replay(log, [0, 1], {given(log): -torch.ones(7)}, result(log)), torch.ones(7))
    fixed = log_of(lambda m, x: x.view(2, 3), rand(6))
    with pytest.raises(RuntimeError):
        replay(fixed, [0], {given(fixed): rand(7)}, result(fixed))


def test_a_value_too_large_to_keep_cannot_be_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oplog, "_HISTORY_LIMIT", 8)
    log = log_of(lambda m, x: x.clone().mul_(2).exp(), rand(8))
    with pytest.raises(ValueError, match="too large"):
        replay(log, [2], {}, result(log))
