"""Graphs of fixed and of changing sizes, with experts that sort their rows for a grouped product.

T tokens, K experts a token, E experts, D width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import moec
from moec import graphlayers
from moec.dynamo import reports
from moec.frontends.fx.outline import Outlined
from moec.frontends.fx.widen import widened
from tests.frontend.graph_inputs import AUTO, layers_in, run_traced
from tests.frontend.test_callers import agrees

D, WIDE, E, K = 16, 24, 4, 2

pytestmark = pytest.mark.filterwarnings("ignore")


pytest.importorskip("transformers.integrations.moe")  # its operator runs in fp32 on a CPU, torch's own in bf16


def product(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """rows[R, C], weights[E, N, C], ends[E] -> [R, N]: each expert's rows by its matrix."""
    grouped: Any = F.grouped_mm if rows.dtype == torch.bfloat16 else torch.ops.transformers.grouped_mm_fallback
    y: Tensor = grouped(rows, weights.transpose(-2, -1), offs=ends)
    return y


class Grouped(nn.Module):
    """Rows sorted by expert, one product for all of them, and back by the inverse of the order."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E, bias=False)
        self.gate_up = nn.Parameter(torch.randn(E, 2 * WIDE, D) / 3)
        self.down = nn.Parameter(torch.randn(E, D, WIDE) / 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, D)
        weights, ids = self.router(rows).softmax(-1).topk(K)
        order = ids.reshape(-1).argsort(stable=True)
        counts = torch.histc(ids.reshape(-1).float(), bins=E, min=0, max=E - 1)
        ends = counts.cumsum(0).to(torch.int32)
        gate, up = product(rows[order // K], self.gate_up, ends).chunk(2, -1)
        y = product(F.silu(gate) * up, self.down, ends)
        y = y * weights.reshape(-1)[order].unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0])
        together: Tensor = y[back].view(rows.shape[0], K, D).sum(1).reshape(x.shape)
        return together


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mixture = nn.LayerNorm(D), Grouped()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.mixture(self.norm(x))
        return y


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def tokens(*lead: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*lead, D, generator=torch.Generator().manual_seed(sum(lead))) * scale


@pytest.mark.parametrize("lead", [(2, 5), (7,), (1, 1), (2, 8)], ids=str)
def test_a_program_of_fixed_sizes(lead: tuple[int, ...]) -> None:
    """Two times eight tokens are as many as the width: numbers that may be either are no ground for a guess."""
    model = net()
    fast = moec.compile(torch.export.export(model, (tokens(*lead),)))
    (layer,) = fast.moec.report.layers
    assert layer.compiled or layer.reason
    if lead in ((2, 5), (7,)):
        assert layer.compiled, layer.reason
        assert "sizes are fixed to" in layer.evidence[-1]
    for scale in (1.0, 30.0):
        agrees(fast.module()(tokens(*lead, scale=scale)), model(tokens(*lead, scale=scale)))


def test_a_program_of_changing_sizes() -> None:
    model = net()
    program = torch.export.export(model, (tokens(2, 5),), dynamic_shapes=({0: AUTO, 1: AUTO},))
    fast = moec.compile(program, strict=True)
    for lead in ((2, 5), (3, 9), (1, 17)):
        agrees(fast.module()(tokens(*lead)), model(tokens(*lead)))


def test_torchs_own_grouped_product_in_sixteen_bits() -> None:
    model, exact = net().bfloat16(), net()
    exact.load_state_dict(model.state_dict())
    x = tokens(2, 5).bfloat16()
    for sizes in (None, ({0: AUTO, 1: AUTO},)):
        with torch.no_grad():
            try:
                program = torch.export.export(model, (x,), dynamic_shapes=sizes)
            except RuntimeError as error:
                pytest.skip(f"torch does not trace it: {error}")
        fast = moec.compile(program)
        want, theirs = exact(x.float()), model(x).float()
        mine = fast.module()(x).float()
        assert (mine - want).norm() <= 1.5 * (theirs - want).norm() + 1e-3 * want.norm()
        assert all(layer.compiled or layer.reason for layer in fast.moec.report.layers)


@pytest.mark.parametrize("dynamic", [False, True])
def test_graphs_of_torch_compile(dynamic: bool) -> None:
    model = net()
    graph = run_traced(model, dynamic=dynamic)
    with torch.no_grad():
        for lead in ((2, 5), (3, 9)):
            agrees(graph(tokens(*lead)), model(tokens(*lead)))
            assert [layer.compiled for layer in reports[-1].layers] == [True], reports[-1]


def test_a_graph_module_of_fixed_sizes() -> None:
    """Other sizes than those it was traced with are no business of it, before and after."""
    model = net()
    with torch.no_grad():
        graph: fx.GraphModule = make_fx(model, tracing_mode="fake", _allow_non_fake_inputs=True)(tokens(2, 5))
    fast = moec.compile(graph, example_inputs=(tokens(2, 5),))
    (layer,) = fast.moec.report.layers
    assert layer.compiled, layer.reason
    assert layers_in(fast.graph) == 1
    agrees(fast(tokens(2, 5, scale=9)), model(tokens(2, 5, scale=9)))
    for one in (graph, fast):
        with pytest.raises(RuntimeError):
            one(tokens(3, 9))


def test_a_wrong_guess_is_told_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    right: Callable[..., Outlined | None] = widened

    def wrong(outlined: Outlined, shape: Any) -> Outlined | None:
        found = right(outlined, shape)
        assert found is not None
        for output in found.module.graph.find_nodes(op="output"):
            with found.module.graph.inserting_before(output):
                (y,) = output.all_input_nodes
                output.args = (found.module.graph.call_function(torch.ops.aten.mul.Tensor, (y, 1.5)),)
        return replace(found, module=fx.GraphModule(found.module, found.module.graph).eval())

    monkeypatch.setattr(graphlayers, "widened", wrong)
    model = net()
    fast = moec.compile(torch.export.export(model, (tokens(2, 5),)))
    assert not fast.moec.report.compiled
    agrees(fast.module()(tokens(2, 5)), model(tokens(2, 5)))
