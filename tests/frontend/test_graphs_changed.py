"""Graphs of models that change after they were traced: weights are live, other changes are an error or traced anew.

B sequences, S tokens a sequence, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import moec
from moec import MoecError
from tests.frontend import changing
from tests.frontend.changing import Direct, Plain, Sliced, made
from tests.frontend.modules import told
from tests.frontend.test_callers import KINDS, agrees
from tests.frontend.traced import both, exported, in_graph, layers_in, tokens

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("options", [{}, {"pack": True}, {"quantize": "int8"}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_graphs_are_live(kind: type[nn.Module], options: dict[str, Any]) -> None:
    """Every way that weights change is seen by a graph as it is by the compiled layer itself."""
    model, fast = both(kind, **options)
    x = tokens(3, 7)
    graph, program = in_graph(fast), exported(fast).module()
    with torch.no_grad():
        before = fast(x)
        agrees(graph(x), before)
        for p in model.parameters():
            p.mul_(1.2)
        assert not torch.allclose(fast(x), before)
        agrees(graph(x), fast(x))
        agrees(program(x), fast(x))
        fast.load_state_dict({name: t * 0.8 for name, t in fast.state_dict().items()})
        agrees(graph(x), fast(x))
        agrees(program(x), fast(x))
        for name, p in list(fast.named_parameters()):
            path, _, leaf = name.rpartition(".")
            setattr(fast.get_submodule(path), leaf, nn.Parameter(p * 1.1))
        agrees(graph(x), fast(x))


def test_layers_of_the_same_text_keep_their_weights_apart() -> None:
    """Two models whose graphs differ in nothing but the tensors handed over."""
    x = tokens(2, 5)
    first, second = made(Direct), made(Direct)
    with torch.no_grad():
        for p in second.parameters():
            p.mul_(1.5)
    programs = [exported(moec.compile(model, pack=True)).module() for model in (first, second)]
    for _ in range(2):
        for model, program in zip((first, second), programs, strict=True):
            agrees(program(x), model(x))


def set_top_k(m: Any) -> None:
    m.top_k = 1


def hook_one_expert(m: Any) -> None:
    next(c for c in m.modules() if isinstance(c, changing.Expert)).register_forward_hook(lambda *a: None)


def replace_activation(m: Any) -> None:
    next(c for c in m.modules() if isinstance(c, changing.Expert)).act = torch.tanh


@pytest.mark.parametrize("change", [set_top_k, hook_one_expert, replace_activation])
def test_a_graph_refuses_a_layer_that_changed_after_tracing(change: Callable[[Any], None]) -> None:
    _, fast = both(Sliced)
    graph, x = in_graph(fast), tokens(2, 5)
    with torch.no_grad():
        graph(x)
        change(fast)
        with pytest.raises(MoecError, match="cannot run compiled inside of a graph") as told_:
            graph(x)
    assert told_.value.code == "MOEC234"
    assert told_.value.hint is not None


def test_tracing_a_changed_layer_takes_the_original() -> None:
    model, fast = both(Sliced)
    fast = moec.compile(model)
    model.top_k = fast.top_k = 1
    with told() as texts:
        program = torch.export.export(moec.restore(copy.deepcopy(fast)), (tokens(2, 5),), strict=False)
    assert layers_in(program) == 0
    with told() as texts:
        program = torch.export.export(fast, (tokens(2, 5),), strict=False)
    assert layers_in(program) == 0
    assert any("'top_k' of the layer is 1" in text for text in texts)
    agrees(program.module()(tokens(2, 5)), model(tokens(2, 5)))


def test_training_mode_is_traced_anew() -> None:
    """A break of the graph where breaks are allowed, and never the eval-mode layer."""
    _, fast = both(Plain)
    fast = moec.compile(made(Plain))
    torch._dynamo.reset()
    graph: Any = torch.compile(fast, backend="aot_eager")
    with torch.no_grad():
        graph(tokens(2, 5))
        assert fast.moec.report.layers[0].fallbacks == 0
        fast.train()
        graph(tokens(2, 5))
        assert fast.moec.report.layers[0].fallback_reasons == {"the layer is in training mode": 1}
        fast.eval()
        graph(tokens(2, 5))
    assert fast.moec.report.layers[0].fallbacks == 1
