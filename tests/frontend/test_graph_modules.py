"""moec.compile of fx.GraphModule and ExportedProgram.

B sequences, S tokens a sequence, D width, E experts, K experts a token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import moec
from moec import MoecError
from tests.frontend.graph_inputs import KINDS, SIZES, exported, layers_in, net, words
from tests.frontend.test_callers import agrees

pytestmark = pytest.mark.filterwarnings("ignore")


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


def test_a_static_program() -> None:
    model = net()
    program = torch.export.export(model, (words(2, 5),))
    fast = moec.compile(program)
    agrees(fast.module()(words(2, 5)), model(words(2, 5)))
    assert all(layer.compiled or layer.reason for layer in fast.moec.report.layers)


@pytest.mark.parametrize("name", ["inplace", "measure"])
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
