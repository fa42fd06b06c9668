"""Compiled layers in graphs: torch.compile(fullgraph=True) and torch.export put them there as `moec::layer`.

B sequences, S tokens a sequence, D width.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moec
from moec import MoecError
from tests.corpus import CASES
from tests.frontend import changing
from tests.frontend.changing import Direct, Plain, Sliced, made
from tests.frontend.modules import told
from tests.frontend.test_callers import KINDS, agrees

AUTO = torch.export.Dim.AUTO
SIZES = ((2, 5), (3, 7), (1, 40), (4, 1))

pytestmark = pytest.mark.filterwarnings("ignore")


def tokens(b: int, s: int) -> Tensor:
    return torch.randn(b, s, changing.D, generator=torch.Generator().manual_seed(b * 100 + s))


def both(kind: type[nn.Module], **options: Any) -> tuple[Any, Any]:
    model = made(kind)
    return model, moec.compile(model, strict=True, **options)


def exported(model: nn.Module, *, strict: bool = False) -> Any:
    return torch.export.export(model, (tokens(2, 5),), dynamic_shapes=({0: AUTO, 1: AUTO},), strict=strict)


def layers_in(program: Any) -> int:
    return sum(node.target is torch.ops.moec.layer.default for node in program.graph.nodes)


def in_graph(fast: nn.Module) -> Any:
    torch._dynamo.reset()
    return torch.compile(fast, backend="aot_eager", fullgraph=True, dynamic=True)


def test_a_tensor_that_the_experts_never_read_goes_along() -> None:
    model = CASES["older.unread_argument"].make()
    x = torch.randn(3, 7, 12)
    with torch.no_grad():
        agrees(in_graph(moec.compile(model, strict=True))(x), model(x))


@pytest.mark.parametrize("name", ["placed.slots", "placed.capacity_submodule", "placed.mask_beside_tokens"])
def test_what_has_no_operator_yet_is_the_original_in_a_program(name: str) -> None:
    case = CASES[name]
    model, given = case.make(), case.inputs(torch.randn(30, 16))
    fast = moec.compile(model, example_inputs=given, strict=True)
    with torch.no_grad():
        agrees(fast(*given), model(*given))
        program = torch.export.export(moec.compile(case.make(), example_inputs=given), given)
        agrees(program.module()(*given), model(*given))
    assert layers_in(program) == 0


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_export_at_sizes_not_traced(kind: type[nn.Module], strict: bool) -> None:
    model, fast = both(kind)
    program = exported(fast, strict=strict)
    assert layers_in(program) == 1
    run = program.module()
    for size in SIZES:
        agrees(run(tokens(*size)), model(tokens(*size)))
    assert fast.moec.report.layers[0].fallbacks == 0


@pytest.mark.parametrize("kind", KINDS)
def test_full_graph_at_sizes_not_traced(kind: type[nn.Module]) -> None:
    model, fast = both(kind)
    again = in_graph(fast)
    with torch.no_grad():
        for size in SIZES:
            agrees(again(tokens(*size)), model(tokens(*size)))
    assert fast.moec.report.layers[0].fallbacks == 0


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


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_come_from_outside_of_the_graph(kind: type[nn.Module]) -> None:
    model, fast = both(kind)
    x = tokens(2, 5)
    torch._dynamo.reset()
    graph: Any = torch.compile(fast, backend="aot_eager")
    params = [p for p in model.parameters() if p.requires_grad]
    mine = torch.autograd.grad(graph(x).square().sum(), params, allow_unused=True)
    agrees(mine, torch.autograd.grad(model(x).square().sum(), params, allow_unused=True))
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch\.no_grad"):
        in_graph(fast)(x)


def test_backward_through_an_exported_program_is_refused() -> None:
    _, fast = both(Direct)
    with pytest.raises(MoecError, match="no backward") as told_:
        exported(fast).module()(tokens(2, 5)).sum().backward()
    assert told_.value.code == "MOEC235"


def test_values_outside_of_what_was_verified_are_an_error() -> None:
    _, fast = both(Direct)
    program = torch.export.export(
        fast.experts, (tokens(1, 6)[0], torch.zeros(6, 2, dtype=torch.int64), torch.ones(6, 2))
    )
    assert layers_in(program) == 1
    with pytest.raises(MoecError, match="expert id 40") as told_:
        program.module()(tokens(1, 6)[0], torch.full((6, 2), 40), torch.ones(6, 2))
    assert told_.value.code == "MOEC234"


def test_inductor(tmp_path: Path) -> None:
    model, fast = both(Sliced)
    torch._dynamo.reset()
    graph: Any = torch.compile(fast, fullgraph=True, dynamic=True)
    with torch.no_grad():
        try:
            graph(tokens(2, 5))
        except torch._inductor.exc.InductorError as error:
            pytest.skip(f"inductor does not work on this machine: {error}")
        for size in SIZES:
            agrees(graph(tokens(*size)), model(tokens(*size)))


def test_a_copy_exports_before_it_ran() -> None:
    model, fast = both(Sliced)
    again = copy.deepcopy(fast)
    program = exported(again)
    assert layers_in(program) == 1
    agrees(program.module()(tokens(3, 7)), model(tokens(3, 7)))
    agrees(again(tokens(3, 7)), model(tokens(3, 7)))


def test_a_saved_program_runs_in_another_process(tmp_path: Path) -> None:
    model, fast = both(Sliced)
    x = tokens(3, 7)
    torch.export.save(exported(fast), tmp_path / "program.pt2")
    torch.save((x, model(x).detach()), tmp_path / "io.pt")
    code = """
import sys, torch, moec.ops
x, want = torch.load(sys.argv[1] + "/io.pt")
program = torch.export.load(sys.argv[1] + "/program.pt2")
torch.testing.assert_close(program.module()(x), want, rtol=1e-4, atol=1e-5)
with torch.no_grad():
    for p in program.module().parameters():
        p.mul_(2)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_text_that_describes_no_layer_is_refused() -> None:
    with pytest.raises(MoecError, match="describes no layer") as told_:
        torch.ops.moec.layer(torch.zeros(2, 3), None, None, [torch.zeros(3, 3)], "{}", "")
    assert told_.value.code == "MOEC234"


def test_other_layouts_of_weights_are_refused() -> None:
    _, fast = both(Plain)
    program = exported(fast)
    (node,) = [n for n in program.graph.nodes if n.target is torch.ops.moec.layer.default]
    text = node.args[4]
    with pytest.raises(MoecError, match="was compiled with") as told_:
        torch.ops.moec.layer(tokens(1, 3)[0], None, None, [torch.zeros(2, 2)] * len(node.args[3]), text, "")
    assert told_.value.code == "MOEC230"


class Scaled(nn.Module):
    """Experts whose result is multiplied by a number, as after a dropout that was folded into eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(changing.Expert() for _ in range(changing.E))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None] * 0.8)
        return out


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(changing.D, changing.E), Scaled()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, changing.D)
        weights, ids = self.router(rows).softmax(-1).topk(2)
        y: Tensor = self.experts(rows, ids, weights)
        return y.view_as(x)


def test_numbers_that_results_are_multiplied_by_are_in_the_graph() -> None:
    torch.manual_seed(1)
    model = Around().eval()
    fast = moec.compile(model, strict=True)
    program = exported(fast)
    assert layers_in(program) == 1
    agrees(program.module()(tokens(3, 7)), model(tokens(3, 7)))


def test_no_tokens() -> None:
    _, fast = both(Direct)
    program = exported(fast)
    (node,) = [n for n in program.graph.nodes if n.target is torch.ops.moec.layer.default]
    params = [dict(fast.named_parameters())[n] for n in program.graph_signature.parameters if "router" not in n]
    ids, weights = torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)
    y = torch.ops.moec.layer(torch.zeros(0, changing.D), ids, weights, params, node.args[4], "")
    assert y.shape == (0, changing.D)


def test_onnx_export_takes_the_original(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    model = made(Plain)
    fast = moec.compile(model)
    with told() as texts:
        program = torch.onnx.export(fast, (tokens(2, 5),), dynamo=True, verbose=False)
    assert program is not None
    assert any("torch.onnx.export" in text for text in texts)
