"""Compiled layers in graphs: torch.compile(fullgraph=True) and torch.export put them there as `moec::layer`.

B sequences, S tokens a sequence, D width.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moec
from tests.corpus import CASES
from tests.frontend.changing import Plain, Sliced, made
from tests.frontend.modules import told
from tests.frontend.test_callers import KINDS, agrees
from tests.frontend.traced import AUTO, SIZES, both, exported, in_graph, layers_in, tokens

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_tensor_that_the_experts_never_read_goes_along() -> None:
    model = CASES["older.unread_argument"].make()
    x = torch.randn(3, 7, 12)
    with torch.no_grad():
        agrees(in_graph(moec.compile(model, strict=True))(x), model(x))


BESIDE = (
    "placed.slots",
    "placed.capacity_submodule",
    "placed.mask_beside_tokens",
    "placed.two_tasks_last_axis",
    "wider.one_choice_a_sequence",
)


@pytest.mark.parametrize("name", BESIDE)
def test_rows_by_places_masks_and_choices_for_a_sequence(name: str) -> None:
    case = CASES[name]
    model, given = case.make(), case.inputs(torch.randn(30, case.dim))
    fast = moec.compile(model, example_inputs=given, strict=True)
    program = torch.export.export(fast, given)
    assert layers_in(program) == 1
    agrees(program.module()(*given), model(*given))
    graph = in_graph(fast)
    with torch.no_grad():
        for count in (30, 48):
            more = case.inputs(torch.randn(count, case.dim) * 3)
            agrees(graph(*more), model(*more))
    assert fast.moec.report.layers[0].fallbacks == 0


def test_rows_by_places_at_sizes_not_traced() -> None:
    case = CASES["placed.slots"]
    model, given = case.make(), case.inputs(torch.randn(30, case.dim))
    program = torch.export.export(
        moec.compile(model, strict=True), given, dynamic_shapes=tuple({0: AUTO, 1: AUTO} for _ in given)
    )
    assert layers_in(program) == 1
    longer = case.inputs(torch.randn(48, case.dim))
    agrees(program.module()(*longer), model(*longer))


def test_another_mask_than_was_verified_is_the_originals() -> None:
    """One mask for all sequences, where one for each was verified."""
    case = CASES["placed.mask_beside_tokens"]
    model, given = case.make(), case.inputs(torch.randn(30, case.dim))
    x, mask = given
    fast = moec.compile(model, example_inputs=given)
    torch._dynamo.reset()
    graph: Any = torch.compile(fast, backend="aot_eager")
    with torch.no_grad():
        agrees(graph(x, mask[:1]), model(x, mask[:1]))
        agrees(graph(x, mask), model(x, mask))
    assert fast.moec.report.layers[0].fallbacks == 1


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


def test_onnx_export_takes_the_original(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    model = made(Plain)
    fast = moec.compile(model)
    with told() as texts:
        program = torch.onnx.export(fast, (tokens(2, 5),), dynamo=True, verbose=False)
    assert program is not None
    assert any("torch.onnx.export" in text for text in texts)
