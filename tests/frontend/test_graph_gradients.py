"""Gradients of compiled layers inside of graphs: torch.compile(fullgraph=True), torch.export and backend="moec".

B sequences, S tokens a sequence, D width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moec
from moec import MoecError
from moec.dynamo import reports
from tests.corpus import CASES
from tests.frontend import changing
from tests.frontend.changing import Direct, Plain, Sliced, made
from tests.frontend.compare import relative, tensors
from tests.frontend.graph_inputs import Batched, Net, net, run_traced, words
from tests.frontend.modules import tokens as case_tokens
from tests.frontend.observed import example
from tests.frontend.traced import SIZES, exported, in_graph, layers_in, tokens

KINDS = (Sliced, Direct, Plain)
BAR = 2e-6

pytestmark = pytest.mark.filterwarnings("ignore")


def without_dropout(kind: type[nn.Module]) -> Any:
    model = made(kind)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def gradients(run: Callable[..., Any], args: Sequence[Any], params: Sequence[Tensor]) -> list[Tensor | None]:
    """Of a weighted sum of all float results, for the first argument and the parameters."""
    x = args[0].detach()
    x = x.clone().requires_grad_() if x.is_floating_point() else x
    outs = [y for y in tensors(run(x, *args[1:])) if y.is_floating_point() and y.requires_grad]
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in outs]
    wanted = [x, *params] if x.requires_grad else list(params)
    return list(torch.autograd.grad(outs, wanted, seeds, allow_unused=True))


def same(got: Sequence[Tensor | None], want: Sequence[Tensor | None], bar: float = BAR) -> None:
    """Equal within the bar by both measures; none is as good as zeros."""
    assert len(got) == len(want)
    assert any(g is not None and bool(g.any()) for g in want)
    for mine, theirs in zip(got, want, strict=True):
        if mine is None or theirs is None:
            assert not any(g is not None and bool(g.any()) for g in (mine, theirs))
        elif bool(theirs.any()):
            assert max(relative(mine, theirs)) <= bar
        else:
            assert not bool(mine.any())


@pytest.mark.parametrize(("kind", "training"), [(kind, True) for kind in KINDS] + [(Sliced, False)])
def test_full_graph(kind: type[nn.Module], training: bool) -> None:
    model = without_dropout(kind)
    fast = moec.compile(model, training=True, strict=True)
    model.train(training)
    graph = in_graph(fast.train(training))
    for size in SIZES[:2]:
        same(
            gradients(graph, (tokens(*size),), list(fast.parameters())),
            gradients(model, (tokens(*size),), list(model.parameters())),
        )
    assert fast.moec.report.layers[0].fallbacks == 0


def test_a_step_of_an_optimizer_is_the_originals() -> None:
    """Graphs read weights where they are: the third step sees what the first two wrote."""
    results = []
    for compiled in (False, True):
        model: Any = without_dropout(Sliced)
        run = in_graph(moec.compile(model, training=True, inplace=True)) if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            optimizer.zero_grad()
            run(tokens(2, 5 + step)).square().mean().backward()
            optimizer.step()
        results.append([p.detach().clone() for p in model.parameters()])
    same(results[1], results[0])


QUICK = ("weights.on_input", "effects.straight_through")
LONG = (
    "loop_list.swiglu",
    "loop_stacked.gelu",
    "sorted.relu",
    "gathered.swiglu",
    "written.flat_pack",
    "ffn.swiglu",
    "selection.bias_only",
)
CHECKED = (*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in LONG))


@pytest.mark.parametrize("name", CHECKED)
def test_the_corpus(name: str) -> None:
    case = CASES[name]
    module = case.make()
    fast = moec.compile(module, example_inputs=example(case), training=True, strict=True)
    assert any("gradients in graphs, " in line for line in fast.moec.report.layers[0].evidence)
    args = case_tokens(name)
    got = gradients(in_graph(fast), args, list(fast.parameters()))
    same(got, gradients(module, args, list(module.parameters())))


def test_frozen_weights_and_a_learned_input() -> None:
    model = without_dropout(Sliced)
    fast = moec.compile(model, training=True, strict=True)
    model.requires_grad_(False)
    same(gradients(in_graph(fast), (tokens(3, 7),), []), gradients(model, (tokens(3, 7),), []))


def test_experts_without_tokens_and_no_tokens_at_all() -> None:
    model = without_dropout(Direct)
    fast = moec.compile(model, training=True, strict=True)
    with torch.no_grad():
        model.router.weight.zero_()  # ties: the same experts for every token
    graph = in_graph(fast)
    for size in ((1, 1), (2, 5)):
        given = (tokens(*size),)
        same(gradients(graph, given, list(fast.parameters())), gradients(model, given, list(model.parameters())))
    (node,) = [n for n in exported(fast).graph.nodes if n.target is torch.ops.moec.layer.default]
    params = list(fast.experts.parameters())
    x = torch.zeros(0, changing.D, requires_grad=True)
    y = torch.ops.moec.layer(x, torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), params, node.args[4], "")
    found = torch.autograd.grad(y.sum(), [x, *params])
    assert [g.shape for g in found] == [t.shape for t in (x, *params)]
    assert not any(bool(g.any()) for g in found)


def test_sixteen_bits() -> None:
    """No further from gradients in fp32 than one and a half times the original's own."""
    model = without_dropout(Direct).bfloat16()
    exact = without_dropout(Direct)
    exact.load_state_dict(model.state_dict())
    fast = moec.compile(model, training=True, strict=True)
    x = tokens(3, 7).bfloat16()
    got = gradients(in_graph(fast), (x,), list(fast.parameters()))
    theirs = gradients(model, (x,), list(model.parameters()))
    want = gradients(exact, (x.float(),), list(exact.parameters()))
    for a, b, c in zip(got, theirs, want, strict=True):
        assert a is not None
        assert b is not None
        assert c is not None
        assert a.dtype == torch.bfloat16
        assert relative(a, c)[0] <= 1.5 * relative(b, c)[0] + 1e-3


class Detached(changing.Experts):
    """No gradient reaches the routing weights."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return super().forward(x, ids, weights.detach())


class AroundDetached(Direct):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Detached()


def test_other_gradients_than_the_originals_are_not_taken() -> None:
    """Where what is recognised has another gradient than the code, the graph breaks and the code runs."""
    model = made(AroundDetached)
    fast = moec.compile(model, training=True)
    (layer,) = fast.moec.report.layers
    assert any(line.startswith("no gradients in graphs: ") for line in layer.evidence)
    torch._dynamo.reset()
    graph = torch.compile(fast, backend="aot_eager")
    same(
        gradients(graph, (tokens(2, 5),), list(fast.parameters())),
        gradients(model, (tokens(2, 5),), list(model.parameters())),
    )
    with pytest.raises(torch._dynamo.exc.Unsupported, match="training=True"):
        in_graph(fast)(tokens(2, 5))
    with pytest.raises(MoecError, match="no backward inside of a graph: argument 2 gets a gradient") as told:
        exported(fast).module()(tokens(2, 5)).sum().backward()
    assert told.value.code == "MOEC235"


def test_an_exported_program() -> None:
    model = without_dropout(Sliced)
    run = exported(moec.compile(model, training=True, strict=True)).module()
    for size in SIZES:
        names = dict(model.named_parameters())
        got = gradients(run, (tokens(*size),), [run.get_parameter(name) for name in names])
        same(got, gradients(model, (tokens(*size),), list(names.values())))


def test_gradients_of_gradients_are_refused() -> None:
    run = exported(moec.compile(without_dropout(Direct), training=True, strict=True)).module()
    x = tokens(2, 5).requires_grad_()
    (grad,) = torch.autograd.grad(run(x).sum(), [x], create_graph=True)
    with pytest.raises(MoecError, match="gradients of gradients") as told:
        grad.sum().backward()
    assert told.value.code == "MOEC235"


def test_a_write_before_the_backward_is_an_error() -> None:
    fast = moec.compile(without_dropout(Direct), training=True, strict=True)
    y = exported(fast).module()(tokens(2, 5)).sum()
    with torch.no_grad():
        fast.experts.down.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_quantised_layers_have_no_gradients() -> None:
    fast = moec.compile(without_dropout(Direct), training=True, quantize="int8")
    assert any(line.startswith("no gradients in graphs: ") for line in fast.moec.report.layers[0].evidence)


class Holed(nn.Module):
    """Its matrices are parts of larger memory: their strides are not those of a tensor of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(16, changing.D + 3)[:, : changing.D])
        self.down = nn.Parameter(torch.randn(changing.D, 16 + 5)[:, :16])

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.gelu(nn.functional.linear(x, self.up)), self.down)


def test_parameters_with_strides_of_their_own() -> None:
    model = made(Holed)
    assert not model.up.is_contiguous()
    fast = moec.compile(model, training=True, strict=True)
    graph = in_graph(fast)
    same(
        gradients(graph, (tokens(2, 5),), list(fast.parameters())),
        gradients(model, (tokens(2, 5),), list(model.parameters())),
    )


def test_graphs_of_torch_compile_recorded_for_a_backward() -> None:
    model = net(blocks=1)
    graph = run_traced(model)
    params = list(model.parameters())
    for size in ((2, 5), (3, 9)):
        same(gradients(graph, (words(*size),), params), gradients(model, (words(*size),), params), 1e-5)
    assert [layer.compiled for layer in reports[-1].layers] == [True] * 2, reports[-1]


class WithoutGate(Batched):
    """The routing weights are detached in the graph itself."""

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(rows)
        return weights.detach(), ids


def test_detached_weights_in_a_graph() -> None:
    model = Net(WithoutGate, 1).eval()
    graph = run_traced(model)
    params = list(model.parameters())
    same(gradients(graph, (words(2, 5),), params), gradients(model, (words(2, 5),), params), 1e-5)


def test_a_program_compiled_for_training() -> None:
    model = net(blocks=1)
    program = torch.export.export(model, (words(2, 5),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    run = moec.compile(program, training=True)
    assert layers_in(run) == 2
    module = run.module()
    names = dict(model.named_parameters())
    got = gradients(module, (words(3, 5),), [module.get_parameter(name) for name in names])
    same(got, gradients(model, (words(3, 5),), list(names.values())), 1e-5)
    plain = moec.compile(program).module()
    with pytest.raises(MoecError, match="training=True") as told:
        plain(words(2, 5)).sum().backward()
    assert told.value.code == "MOEC235"
    assert told.value.hint is not None
