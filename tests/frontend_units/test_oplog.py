"""The log names tensors by memory, knows each value at each moment, and who made, wrote and used it."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor

from moec.frontends.torch import oplog
from moec.frontends.torch.oplog import Ref, slots
from tests.frontend_units.build import given, log_of, names, rand, result, slot_of, value


def test_a_view_back_to_the_same_memory_is_the_same_tensor() -> None:
    log = log_of(lambda m, x: x.view(3, 2).view(2, 3), rand(2, 3))
    assert result(log) == given(log)
    assert names(log) == ["view", "view"]


def test_another_shape_stride_offset_or_dtype_is_another_tensor() -> None:
    log = log_of(lambda m, x: (x.view(3, 2), x.t(), x[1:], x.view(torch.int32)), rand(2, 3))
    found = {given(log), *slots(log.result)}
    assert len(found) == 5
    assert len({log.storages[s] for s in found}) == 1


def test_memory_freed_during_the_run_is_not_mistaken_for_what_comes_after() -> None:
    def count_up(m: Any, x: Tensor) -> Tensor:
        for _ in range(40):
            x = x + 1
        return x

    log = log_of(count_up, rand(8))
    assert len(log.tensors) == 41
    assert [log.producer(s) for s in range(41)] == [None, *range(40)]


def test_the_value_at_each_moment_of_writing() -> None:
    def write(m: Any, x: Tensor) -> Tensor:
        y = x.clone()
        y.add_(1)
        y.mul_(2)
        return y

    x = rand(4)
    log = log_of(write, x.clone())
    y = result(log)
    assert names(log) == ["clone", "add_", "mul_"]
    for at, expected in ((1, x), (2, x + 1), (3, (x + 1) * 2), (None, (x + 1) * 2)):
        assert torch.equal(value(log, y, at), expected), at


def test_a_write_through_a_view_changes_what_the_whole_is() -> None:
    def write(m: Any, x: Tensor) -> Tensor:
        y = x.clone()
        y[1].fill_(7)
        return y

    x = rand(2, 3)
    log = log_of(write, x.clone())
    fill = names(log).index("fill_")
    assert torch.equal(value(log, result(log), fill), x)
    assert value(log, result(log))[1].tolist() == [7, 7, 7]
    assert log.writers(result(log), len(log.entries)) == [fill]
    assert log.writers(result(log), fill) == []


def test_what_is_written_in_place_is_not_made_there() -> None:
    log = log_of(lambda m, x: x.clone().add_(1), rand(3))
    assert log.producer(result(log)) == names(log).index("clone")


def test_an_input_that_is_written_keeps_its_first_value() -> None:
    x = rand(3)
    log = log_of(lambda m, x: x.mul_(2), x.clone())
    assert torch.equal(value(log, given(log), 0), x)
    assert torch.equal(value(log, given(log)), x * 2)


def test_a_written_tensor_too_large_to_keep_has_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oplog, "_HISTORY_LIMIT", 16)
    log = log_of(lambda m, x: (x + 1, x.clone().mul_(2)), rand(8))
    read, written = slots(log.result)
    assert log.value(written) is None
    assert log.value(read) is not None


def test_a_tensor_inside_a_parameter_has_its_name() -> None:
    log = log_of(lambda m, x: (m.w[1].t(), x + m.b, x), rand(3), w=rand(2, 3, 3), b=rand(3))
    part, made, x = slots(log.result)
    assert log.param_of(part) == "w"
    assert log.param_of(made) is None
    assert log.param_of(x) is None


def test_closure_is_what_a_value_depends_on() -> None:
    def mixed(m: Any, x: Tensor, y: Tensor) -> Tensor:
        a = x + 1
        b = a * 2
        c = y.neg()
        b.sub(c)
        return c.exp()

    log = log_of(mixed, rand(2), rand(2, seed=1))
    assert names(log) == ["add", "mul", "neg", "sub", "exp"]
    assert log.closure([(result(log), 5)]) == {2, 4}
    difference = log.entries[3].results[0]
    assert log.closure([(difference, 5)]) == {0, 1, 2, 3}
    assert log.closure([(difference, 3)]) == set()
    assert log.closure([(difference, 5)], start=2) == {2, 3}


def test_closure_stops_at_a_given_value_but_sees_later_writes() -> None:
    def late(m: Any, x: Tensor) -> Tensor:
        a = x + 1
        b = a * 2
        b.add_(a)
        return b.exp()

    log = log_of(late, rand(2))
    assert names(log) == ["add", "mul", "add_", "exp"]
    b = log.entries[1].results[0]
    assert log.closure([(result(log), 4)]) == {0, 1, 2, 3}
    assert log.closure([(result(log), 4)], stop={b: 2}) == {3}
    assert log.closure([(result(log), 4)], stop={b: 1}) == {0, 2, 3}


def test_users_are_found_behind_moves() -> None:
    def moved(m: Any, x: Tensor) -> Tensor:
        y = x * 2
        z = y.view(2, 3).t()
        z + 1
        y - 1
        return torch.cat([x, x])

    log = log_of(moved, rand(6))
    y = log.entries[0].results[0]
    moves = {"view", "t"}
    assert [e.name for e in log.users_behind(y, 0, moves)] == ["add", "sub"]
    assert [e.name for e in log.users_behind(y, names(log).index("add"), moves)] == ["sub"]
    assert [e.name for e in log.users_behind(y, 0, {"view"})] == ["t", "sub"]


def test_slots_come_in_order_from_any_tree() -> None:
    Pair = namedtuple("Pair", ["a", "b"])
    tree = [Ref(3), (1, {"x": Ref(1), "y": [Ref(2)]}), Pair(Ref(5), "text"), None, slice(0, 2)]
    assert slots(tree) == (3, 1, 2, 5)


def test_consumers_are_those_that_read() -> None:
    log = log_of(lambda m, x: x + x.exp() * x, rand(2))
    assert [e.name for e in log.consumers(given(log))] == ["exp", "mul", "add"]
    assert list(log.consumers(result(log))) == []


def test_a_named_tuple_of_results_is_followed() -> None:
    log = log_of(lambda m, x: x.topk(2).indices, rand(2, 4))
    (entry,) = log.entries
    assert len(entry.results) == 2
    assert result(log) == entry.results[1]
    assert slot_of(entry.args[0]) == given(log)
