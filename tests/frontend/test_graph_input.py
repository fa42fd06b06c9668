"""Graphs as input: fx.GraphModule, ExportedProgram, and the graphs of torch.compile(backend="moec").

B sequences, S tokens a sequence, D width, E experts, K experts a token.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import moec
from moec import MoecError
from moec.dynamo import moec_backend, reports
from tests.frontend.test_callers import agrees

D, E, WIDE, WORDS = 8, 4, 12, 30
AUTO = torch.export.Dim.AUTO
SIZES = ((2, 5), (3, 9), (1, 17))

pytestmark = pytest.mark.filterwarnings("ignore")


class Batched(nn.Module):
    """Top-2 of E experts whose weights are gathered for each token: torch can trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E)
        self.gate_up = nn.Parameter(torch.randn(E, 2 * WIDE, D) / 3)
        self.down = nn.Parameter(torch.randn(E, D, WIDE) / 3)

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.router(rows).softmax(-1).topk(2)
        return weights, ids

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, D)
        weights, ids = self.route(rows)
        gate, up = torch.einsum("td,tkhd->tkh", rows, self.gate_up[ids]).chunk(2, -1)
        y = torch.einsum("tkh,tkdh->tkd", F.silu(gate) * up, self.down[ids])
        return (y * weights[..., None]).sum(1).reshape(x.shape)


class WrittenTo(Batched):
    """Its weights are normalised in place, and read again."""

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(rows)
        weights.div_(weights.sum(-1, keepdim=True))
        return weights, ids


class Noted(Batched):
    """The router's logits are a result of their own."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), self.router(x.reshape(-1, D))


class Block(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.norm, self.mixture, self.last = nn.LayerNorm(D), kind(), nn.LayerNorm(D)
        self.up, self.down = nn.Linear(D, 40), nn.Linear(40, D)

    def forward(self, h: Tensor) -> Any:
        y = self.mixture(self.norm(h))
        y, noted = y if isinstance(y, tuple) else (y, None)
        h = h + y
        h = h + self.down(F.gelu(self.up(self.last(h))))
        return h if noted is None else (h, noted)


class Net(nn.Module):
    """Blocks of a mixture and a plain FFN, between an embedding and a head."""

    def __init__(self, kind: type[nn.Module] = Batched, blocks: int = 2) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(WORDS, D), nn.Linear(D, WORDS)
        self.blocks = nn.ModuleList(Block(kind) for _ in range(blocks))

    def forward(self, ids: Tensor) -> Any:
        h, notes = self.embedding(ids), []
        for block in self.blocks:
            h = block(h)
            if isinstance(h, tuple):
                h, noted = h
                notes.append(noted)
        return (self.head(h), *notes) if notes else self.head(h)


def net(kind: type[nn.Module] = Batched, blocks: int = 2) -> Net:
    torch.manual_seed(0)
    return Net(kind, blocks).eval()


def words(b: int, s: int) -> Tensor:
    return torch.randint(0, WORDS, (b, s), generator=torch.Generator().manual_seed(b * 100 + s))


def exported(model: nn.Module) -> Any:
    return torch.export.export(model, (words(2, 5),), dynamic_shapes=({0: AUTO, 1: AUTO},))


def layers_in(graph: fx.Graph) -> int:
    return sum(node.target is torch.ops.moec.layer.default for node in graph.nodes)


KINDS = [Batched, WrittenTo, Noted]


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_program(kind: type[nn.Module]) -> None:
    model = net(kind)
    program = exported(model)
    fast = moec.compile(program)
    assert type(fast) is type(program)
    assert layers_in(fast.graph) == 4, fast.moec.report
    assert layers_in(program.graph) == 0
    assert fast.moec.report.whole_model_error < 1e-6
    for size in SIZES:
        agrees(fast.module()(words(*size)), model(words(*size)))
    assert {id(t) for t in fast.state_dict.values()} == {id(t) for t in program.state_dict.values()}
    assert fast.graph_signature.parameters == program.graph_signature.parameters


def test_a_rewritten_program_is_saved_and_loaded(tmp_path: Path) -> None:
    model = net()
    torch.export.save(moec.compile(exported(model)), tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    agrees(loaded(words(3, 9)), model(words(3, 9)))


@pytest.mark.parametrize("example", [None, (words(2, 5),)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_module(kind: type[nn.Module], example: Any) -> None:
    model = net(kind)
    graph = fx.symbolic_trace(model)
    fast = moec.compile(graph, example_inputs=example)
    if example is not None:
        assert layers_in(fast.graph) == 4, fast.moec.report
    assert layers_in(graph.graph) == 0
    assert fast.state_dict().keys() == graph.state_dict().keys()
    with torch.no_grad():
        for size in SIZES:
            agrees(fast(words(*size)), model(words(*size)))
        for p in model.parameters():
            p.mul_(1.1)
        agrees(fast(words(3, 9)), model(words(3, 9)))


def run_traced(model: nn.Module, *, dynamic: bool | None = True, **options: Any) -> Any:
    torch._dynamo.reset()
    reports.clear()
    return torch.compile(
        model, backend=moec_backend, fullgraph=True, dynamic=dynamic, options={"inner": "eager", **options}
    )


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_of_torch_compile(kind: type[nn.Module]) -> None:
    model = net(kind, 1)
    graph = run_traced(model)
    with torch.no_grad():
        for size in SIZES:
            agrees(graph(words(*size)), model(words(*size)))
        assert [layer.compiled for layer in reports[-1].layers] == [True] * 2, reports[-1]
        assert reports[-1].layers[0].name == "blocks.0.mixture"
        for p in model.parameters():
            p.mul_(1.1)
        agrees(graph(words(3, 9)), model(words(3, 9)))


def test_a_graph_that_is_recorded_for_a_backward_is_passed_on() -> None:
    model = net(blocks=1)
    graph = run_traced(model)
    params = list(model.parameters())
    mine = torch.autograd.grad(graph(words(2, 5)).square().sum(), params)
    agrees(mine, torch.autograd.grad(model(words(2, 5)).square().sum(), params))
    assert reports == []


def test_graphs_without_layers_are_passed_on() -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh()).eval()
    graph = run_traced(model)
    with torch.no_grad():
        agrees(graph(torch.ones(3, D)), model(torch.ones(3, D)))
    assert not any(report.compiled for report in reports)


def test_options_of_the_back_end() -> None:
    graph = run_traced(net(blocks=1), quantize="int8")
    with torch.no_grad():
        graph(words(2, 5))
    assert all("quantize-experts" in layer.passes for layer in reports[-1].compiled)
    wrong = run_traced(net(blocks=1), quantise="int8")
    with torch.no_grad(), pytest.raises(Exception, match="quantise"):
        wrong(words(2, 5))


def test_the_back_end_by_its_name(tmp_path: Path) -> None:
    """Through the entry point that pyproject.toml declares."""
    root = Path(__file__).parents[2]
    declared = tomllib.loads((root / "pyproject.toml").read_text())["project"]["entry-points"]
    lines = [f"{name} = {value}" for name, value in declared["torch_dynamo_backends"].items()]
    info = tmp_path / "moec_entry_points-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: moec-entry-points\nVersion: 0\n")
    (info / "entry_points.txt").write_text("\n".join(["[torch_dynamo_backends]", *lines, ""]))
    code = """
import torch
from torch import nn
model = nn.Sequential(nn.Linear(8, 40), nn.GELU(), nn.Linear(40, 8)).eval()
with torch.no_grad():
    graph = torch.compile(model, backend="moec", dynamic=True, options={"inner": "eager"})
    torch.testing.assert_close(graph(torch.ones(3, 8)), model(torch.ones(3, 8)))
from moec.dynamo import reports
assert [layer.compiled for layer in reports[-1].layers] == [True], reports[-1]
"""
    path = f"{tmp_path}:{root}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={"PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr


class Leaking(Batched):
    """What one expert's product gives is used outside of the layer."""

    def forward(self, x: Tensor) -> Any:
        rows = x.reshape(-1, D)
        weights, ids = self.route(rows)
        hidden = torch.einsum("td,tkhd->tkh", rows, self.gate_up[ids])
        gate, up = hidden.chunk(2, -1)
        y = torch.einsum("tkh,tkdh->tkd", F.silu(gate) * up, self.down[ids])
        return (y * weights[..., None]).sum(1).reshape(x.shape), hidden.mean()


class Overwritten(Batched):
    """The input is changed in place between the router and the experts."""

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        found = super().route(rows)
        rows.mul_(2)
        return found


class OverwrittenLater(Batched):
    """The input is changed in place when it is no longer read."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        x.mul_(2)
        return y


class WithDropout(Batched):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(self.drop(x) + 0 * x)
        return y


@pytest.mark.parametrize("kind", [Leaking, Overwritten])
def test_parts_that_are_not_closed_are_left_alone(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(D), kind()).eval()
    fast = moec.compile(fx.symbolic_trace(model), example_inputs=(torch.randn(2, 5, D),))
    x = torch.randn(3, 7, D)
    agrees(fast(x.clone()), model(x.clone()))
    assert layers_in(fast.graph) == 0
    assert all(layer.reason for layer in fast.moec.report.layers)


def test_writes_behind_a_part_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(OverwrittenLater()).eval()
    fast = moec.compile(fx.symbolic_trace(model), example_inputs=(torch.randn(2, 5, D),))
    mine = torch.randn(3, 7, D)
    theirs = mine.clone()
    agrees(fast(mine), model(theirs))
    agrees(mine, theirs)


def test_training_mode_of_modules_in_a_part() -> None:
    """A dropout inside of the layer keeps it from being written anew; one in front of it stays where it is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(D), WithDropout()).eval()
    fast = moec.compile(fx.symbolic_trace(model), example_inputs=(torch.randn(2, 5, D),))
    x = torch.randn(3, 7, D)
    agrees(fast(x), model(x))
    for m in (fast, model):
        m.train()
    torch.manual_seed(3)
    mine = fast(x)
    torch.manual_seed(3)
    agrees(mine, model(x))


def test_a_static_program_is_left_as_it_is() -> None:
    model = net()
    program = torch.export.export(model, (words(2, 5),))
    fast = moec.compile(program)
    agrees(fast.module()(words(2, 5)), model(words(2, 5)))
    assert all(layer.compiled or layer.reason for layer in fast.moec.report.layers)


def test_strict() -> None:
    model = nn.Sequential(nn.LayerNorm(D), Leaking()).eval()
    with pytest.raises(MoecError) as told:
        moec.compile(fx.symbolic_trace(model), example_inputs=(torch.randn(2, 5, D),), strict=True)
    assert told.value.code == "MOEC220"


@pytest.mark.parametrize("name", ["inplace", "training", "measure"])
def test_options_that_graphs_do_not_have(name: str) -> None:
    graph, options = fx.symbolic_trace(net()), dict[str, Any]({name: True})
    with pytest.raises(MoecError, match=name):
        moec.compile(graph, **options)


def test_an_example_that_does_not_fit() -> None:
    with pytest.raises(MoecError) as told:
        moec.compile(fx.symbolic_trace(net()), example_inputs=(torch.randn(2, 5),))
    assert told.value.code == "MOEC211"


def test_explain_changes_nothing() -> None:
    graph = fx.symbolic_trace(net())
    text = graph.code
    report = moec.explain(graph, (words(2, 5),))
    assert len(report.compiled) == 4
    assert graph.code == text
    assert not hasattr(graph, "moec")
