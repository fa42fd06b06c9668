"""Recording runs the user's code once, sees what it reads on the host and whom it calls, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moec.frontends.torch.oplog import HOST_READ, Ref
from moec.frontends.torch.recorder import record
from tests.frontend_units.build import Do, given, log_of, names, rand, slot_of, value

READS: dict[str, Callable[[Tensor], object]] = {
    "tolist": lambda t: t.tolist(),
    "item": lambda t: t[0].item(),
    "bool": lambda t: bool(t[0] > 0),
    "if": lambda t: 1 if t[0] > 0 else 0,
    "int": lambda t: int(t[0]),
    "float": lambda t: float(t[0]),
    "numpy": lambda t: t.numpy(),
    "equal": lambda t: torch.equal(t, t + 1),
    "data_ptr": lambda t: t.data_ptr(),
    "the number of non-zeros": lambda t: t.nonzero().numel(),
    "the number of places": lambda t: len(torch.where(t > 0)[0]),
    "the number selected": lambda t: len(t[t > 0]),
    "the number masked": lambda t: len(t.masked_select(t > 0)),
    "the number of values": lambda t: len(t.unique()),
    "two compared": lambda t: torch.equal(torch.zeros(3), t),
}


@pytest.mark.parametrize("how", READS)
def test_a_read_on_the_host_is_seen(how: str) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        READS[how](x)
        return x * 2

    log = log_of(run, rand(3))
    reads = [e for e in log.entries if e.op == HOST_READ]
    assert reads, names(log)
    behind = log.closure([(s, e.index) for e in reads for s in e.reads])
    touched = {s for i in behind for s in log.entries[i].reads} | {s for e in reads for s in e.reads}
    assert given(log) in touched


def test_without_a_read_there_is_none() -> None:
    log = log_of(lambda m, x: torch.where(x > 0, x, 0)[torch.tensor([2, 0])].sum(), rand(3))
    assert [e.name for e in log.entries if e.op == HOST_READ and e.reads] == []


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def helper(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return x * scale

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return self.helper(y, scale=2.0) + 1


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        if self.fails:
            raise RuntimeError("on purpose")
        return y.exp()


def test_sites_are_the_calls_with_their_entries() -> None:
    log = record(Outer(), (rand(2, 3),), {}, path="layer")
    outer, inner, linear, helper = log.sites
    assert [s.label for s in log.sites] == ["layer", "layer.inner", "layer.inner.linear", "layer.inner.helper"]
    assert (outer.start, outer.end) == (0, len(log.entries))
    assert linear.end == helper.start
    assert helper.end < inner.end < outer.end
    assert [s.parent for s in log.sites] == [None, outer, inner, inner]
    assert (helper.method, helper.kwargs) == ("helper", {"scale": 2.0})
    assert slot_of(linear.args[0]) == slot_of(outer.args[0])
    assert helper.result == Ref(log.entries[helper.end - 1].results[0])
    assert outer.covers([0, len(log.entries) - 1])
    assert not inner.covers([len(log.entries) - 1])


def test_parameters_are_named_with_the_path() -> None:
    module = Outer()
    log = record(module, (rand(2, 3),), {}, path="layer")
    assert set(log.params.values()) == {"layer.inner.linear.weight", "layer.inner.linear.bias"}


def test_buffers_are_named_too_and_tied_parameters_by_their_first_name() -> None:
    module = Do(lambda m, x: x * m.b.weight + m.scale, a=nn.Linear(3, 3, bias=False), b=nn.Linear(3, 3, bias=False))
    module.b.weight = module.a.weight  # type: ignore[union-attr]
    module.register_buffer("scale", torch.ones(3))
    log = record(module, (rand(3),), {})
    assert set(log.params.values()) == {"a.weight", "scale"}


def test_another_method_than_forward() -> None:
    module = Inner()
    log = record(module, (rand(2, 3),), {"scale": 3.0}, method="helper")
    assert [s.label for s in log.sites] == [".helper"]
    assert torch.equal(value(log, slot_of(log.result)), rand(2, 3) * 3)


@pytest.mark.parametrize("fails", [False, True])
def test_recording_leaves_no_trace(fails: bool) -> None:
    module = Outer()
    module.fails = fails
    before = [(m, dict(m.__dict__)) for m in module.modules()]
    if fails:
        with pytest.raises(RuntimeError, match="on purpose"):
            record(module, (rand(2, 3),), {})
    else:
        record(module, (rand(2, 3),), {})
    for child, attributes in before:
        assert child.__dict__ == attributes
    # The modes of torch are gone as well: nothing is recorded, gradients are on.
    assert module.inner(rand(2, 3)).requires_grad


def test_an_interrupt_leaves_no_trace() -> None:
    def interrupt(m: Any, x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    module = Do(interrupt, inner=Inner())
    with pytest.raises(KeyboardInterrupt):
        record(module, (rand(3),), {})
    assert "forward" not in module.__dict__
    assert not {"forward", "helper"} & module.inner.__dict__.keys()


def test_a_method_overridden_on_the_instance_stays() -> None:
    module = Inner()
    module.helper = lambda x, scale: x * 5  # type: ignore[method-assign, assignment, misc]
    own = module.__dict__["helper"]
    log = record(module, (rand(2, 3),), {})
    assert module.__dict__["helper"] is own
    assert [s.method for s in log.sites] == ["forward", "forward"]


def test_the_result_is_what_the_code_computes() -> None:
    module = Outer().eval()
    x = rand(2, 3)
    log = record(module, (x.clone(),), {})
    with torch.no_grad():
        assert torch.equal(value(log, slot_of(log.result)), module(x))


def test_runs_without_gradients() -> None:
    log = record(Outer(), (rand(2, 3),), {})
    assert not any(t.requires_grad for t in log.tensors if log.param_of(log.slot(t)) is None)


def test_writes_are_seen_where_the_schema_says_so() -> None:
    def write(m: Any, x: Tensor) -> Tensor:
        out = torch.zeros(3)
        torch.add(x, 1, out=out)
        out.index_add_(0, torch.tensor([0]), torch.ones(1))
        return out

    log = log_of(write, rand(3))
    writing = [e.name for e in log.entries if slot_of(log.result) in e.writes]
    assert writing == ["add", "index_add_"]
