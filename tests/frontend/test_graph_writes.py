"""Graphs that write in place, through whatever alias; and that looking at a graph leaves the caller's state alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import moec
from moec import MoecError, dynamo, graphlayers, graphmodules
from moec.dynamo import reports
from moec.frontends.fx.memory import Memory
from moec.undisturbed import undisturbed
from tests.frontend.graph_inputs import AUTO, run_traced
from tests.frontend.test_callers import agrees

D, WIDE = 8, 32

pytestmark = pytest.mark.filterwarnings("ignore")


class Written(nn.Module):
    """An FFN whose input or weights are written to between its first product and its result."""

    def __init__(self, write: Callable[[Any, Tensor], Any] | None = None) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(D, WIDE), nn.Linear(WIDE, D), nn.ReLU(inplace=True)
        self.requires_grad_(False)
        self.write = write

    def forward(self, x: Tensor) -> Any:
        x = x + 1.0
        h = self.up(x)
        z = self.write(self, x) if self.write is not None else x
        return self.down(torch.relu(h)), z


class Residual(Written):
    """Reads its input again behind the write."""

    def forward(self, x: Tensor) -> Any:
        y, z = super().forward(x)
        return y + x, z


def _power(_: Any, x: Tensor) -> Tensor:
    x **= 2
    return x.sum()


WRITES: dict[str, Callable[[Any, Tensor], Any]] = {
    "ravel": lambda _, x: x.ravel().mul_(3).sum(),
    "moveaxis": lambda _, x: x.moveaxis(0, 1).mul_(3).sum(),
    "swapdims": lambda _, x: x.swapdims(0, 1).mul_(3).sum(),
    "tensor_split": lambda _, x: x.tensor_split(2)[0].mul_(3).sum(),
    "type_as": lambda _, x: x.type_as(x).mul_(3).sum(),
    "dropout": lambda _, x: F.dropout(x, 0.1, False).mul_(3).sum(),
    "relu": lambda _, x: F.relu(x, True).sum(),
    "module": lambda m, x: m.act(x).sum(),
    "power": _power,
    "weight": lambda m, x: m.up.weight.mul_(1.01).sum(),
}


def ffn(kind: type[Written], write: str = "") -> Written:
    torch.manual_seed(0)
    return kind(WRITES.get(write)).eval()


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("how", ["fx", "export", "dynamo"])
def test_writes_on_the_way_are_seen(how: str, write: str) -> None:
    model, x = ffn(Residual, write), torch.randn(6, D)
    wanted = copy.deepcopy(model)(x.clone())
    with torch.no_grad():
        if how == "fx":
            fast: Any = moec.compile(fx.symbolic_trace(copy.deepcopy(model)), example_inputs=(x.clone(),))
            fast.up.weight.copy_(model.up.weight)  # to trace a write to a weight is to do it
        elif how == "export":
            program = torch.export.export(copy.deepcopy(model), (x.clone(),), dynamic_shapes=({0: AUTO},))
            fast = moec.compile(program).module()
        else:
            fast = run_traced(copy.deepcopy(model))
        agrees(fast(x.clone()), wanted)


def test_what_shares_memory() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    unknown, fresh = graph.call_method("conj", (x,)), graph.call_function(torch.matmul, (x, x))
    both = graph.call_function(torch.logical_and, (x, x))
    quiet = graph.call_function(F.relu, (x, False))
    loud = graph.call_function(F.relu, (fresh, True))
    normed = graph.call_function(F.embedding, (x, both), {"max_norm": 1.0})
    memory = Memory(graph, nn.Module(), {})
    assert unknown in memory.aliases(x)
    assert not {fresh, quiet} & memory.aliases(x)
    assert loud in memory.aliases(fresh)
    assert memory.writes.keys() == {loud, normed}


class Noisy(Written):
    """Random numbers are made without an input, and go through the layer."""

    def forward(self, x: Tensor) -> Any:
        return self.down(torch.relu(self.up(x) + torch.rand(WIDE)))


def test_random_numbers_are_no_constants() -> None:
    x, graph = torch.randn(6, D), fx.Graph()
    root = ffn(Noisy)
    inner = graph.call_module("up", (graph.placeholder("x"),))
    noisy = graph.call_function(torch.add, (inner, graph.call_function(torch.rand, (WIDE,))))
    graph.output(graph.call_module("down", (graph.call_function(torch.relu, (noisy,)),)))
    fast = moec.compile(fx.GraphModule(root, graph), example_inputs=(x,))
    assert not fast.moec.report.compiled
    torch.manual_seed(1)
    mine = fast(x)
    torch.manual_seed(1)
    agrees(mine, root(x))


class Counting(Written):
    """Counts its calls in a buffer, doubles its input, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Tensor
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        y = self.down(torch.relu(self.up(x)))
        self.count.add_(x.new_ones(()))
        x.mul_(2)
        return y, torch.rand_like(x) + self.count


@pytest.mark.parametrize("how", ["fx", "explain", "export", "dynamo"])
def test_the_callers_state_stays(how: str) -> None:
    torch.manual_seed(0)
    model, x = Counting().eval(), torch.ones(4, D)
    if how == "export":
        graph: Any = torch.export.export(model, (x,), dynamic_shapes=({0: AUTO},))
    elif how != "dynamo":
        graph = fx.symbolic_trace(model)
    state = torch.get_rng_state()
    if how == "dynamo":
        other = copy.deepcopy(model)
        with torch.no_grad():
            mine = run_traced(model)(x.clone())
            assert reports[-1].compiled, reports[-1]
            assert reports[-1].whole_model_error is not None
            torch.set_rng_state(state)
            agrees(mine, other(x.clone()))
        assert model.count == 1
        return
    report = moec.explain(graph, (x,)) if how == "explain" else moec.compile(
        graph, example_inputs=None if how == "export" else (x,)
    ).moec.report  # fmt: skip
    assert len(report.compiled) == 1
    assert report.whole_model_error is not None
    assert report.whole_model_error < 1e-6
    assert model.count == 0
    assert torch.equal(x, torch.ones(4, D))
    assert torch.equal(state, torch.get_rng_state())


def _off(original: Any) -> Any:
    """rewrite, and then results that are twice what they were."""

    def rewrite(graph: fx.Graph, *args: Any) -> Any:
        report = original(graph, *args)
        for node in graph.nodes:
            if node.target is torch.ops.moec.layer.default:
                with graph.inserting_after(node):
                    twice = graph.call_function(torch.mul, (node, 2))
                node.replace_all_uses_with(twice, delete_user_cb=lambda user, twice=twice: user is not twice)
        return report

    return rewrite


class Plain(Written):
    def forward(self, x: Tensor) -> Any:
        return self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("kind", [Plain, Counting])
def test_a_graph_with_other_values_is_refused(kind: type[Written], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(4, D)
    wrong = _off(graphlayers.rewrite)
    monkeypatch.setattr(graphmodules, "rewrite", wrong)
    monkeypatch.setattr(dynamo, "rewrite", wrong)
    with pytest.raises(MoecError) as told:
        moec.compile(fx.symbolic_trace(model), example_inputs=(x,))
    assert told.value.code == "MOEC221"
    other = copy.deepcopy(model)
    graph = run_traced(model)
    torch.manual_seed(1)
    with torch.no_grad(), pytest.warns(UserWarning, match="MOEC221"):
        mine = graph(x.clone())
    torch.manual_seed(1)
    agrees(mine, other(x.clone()))
    assert not reports[-1].compiled
    assert "whole graph" in reports[-1].layers[0].reason


@pytest.mark.parametrize("recording", [True, False])
def test_the_callers_grad_mode_lasts(recording: bool) -> None:
    with torch.set_grad_enabled(recording), undisturbed():
        assert torch.is_grad_enabled() is recording
    with torch.inference_mode(), undisturbed():
        assert not torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()
