"""moec.compile of graphs: fx.GraphModule and ExportedProgram. Layers are rewritten, everything else stays as it is."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from moec.errors import MoecError
from moec.frontends.fx.apart import judge, module_apart, run_apart
from moec.frontends.fx.outline import SEEN, Weight
from moec.graphlayers import rewrite, written_weights
from moec.options import Options
from moec.report import Report

Example = tuple[tuple[Any, ...], dict[str, Any]] | None


def is_graph(model: Any) -> bool:
    """Whether it is something that compile_graph takes."""
    return isinstance(model, fx.GraphModule | torch.export.ExportedProgram)


def compile_graph(model: Any, example: Example, options: Options) -> Any:
    """A copy of an fx.GraphModule or ExportedProgram over the same tensors, its layers rewritten, with `.moec.report`.

    Raises MOEC503 for options that graphs do not have, MOEC211 for an example that the graph does not run on, MOEC220
    under strict, and MOEC221 where the whole graph differs on the example.
    """
    for name in ("inplace", "measure"):
        if getattr(options, name):
            raise MoecError("MOEC503", f"{name} does not exist for graphs", hint=f"leave {name} out")
    if isinstance(model, fx.GraphModule):
        return compile_graph_module(model, example, options)
    return compile_program(model, options)


def compile_graph_module(model: fx.GraphModule, example: Example, options: Options) -> fx.GraphModule:
    """A copy of the graph over the same tensors, its layers as `moec::layer`. Raises what moec.compile raises."""
    start = time.perf_counter()
    twin = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    weights = {}
    for node in twin.graph.find_nodes(op="get_attr"):
        tensor = _attribute(twin, str(node.target))
        if isinstance(tensor, torch.Tensor):
            weights[node] = Weight(str(node.target), tensor)
        node.meta.pop(SEEN, None)
    changed = written_weights(twin.graph, weights, twin)
    if example is not None:
        _look(module_apart(model, changed), twin, example)
    try:
        report = rewrite(twin.graph, weights, twin, options)
    finally:
        for node in twin.graph.nodes:
            node.meta.pop(SEEN, None)
    twin.graph.lint()
    twin.recompile()
    if report.compiled and example is not None:
        _check(lambda one: module_apart(one, changed), model, twin, example, report)
    _finish(twin, report, start)
    return twin


def compile_program(program: torch.export.ExportedProgram, options: Options) -> torch.export.ExportedProgram:
    """A copy of the program over the same tensors, its layers as `moec::layer`; it is saved and run like any other."""
    start = time.perf_counter()
    shared = {id(t): t for t in (*program.state_dict.values(), *program.constants.values())}
    twin = copy.deepcopy(program, shared)
    signature = twin.graph_signature
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    tensors = {**twin.constants, **twin.state_dict}
    changed = set(signature.buffers_to_mutate.values())
    weights = {
        node: Weight(held[node.name], tensors[held[node.name]])
        for node in twin.graph.find_nodes(op="placeholder")
        if node.name in held and held[node.name] in tensors and held[node.name] not in changed
    }
    report = rewrite(
        twin.graph, weights, twin.graph_module, options, lambda a, b: signature.replace_all_uses(a.name, b.name)
    )
    twin.graph_module.recompile()
    twin.validate()
    example = program.example_inputs
    if report.compiled and example is not None:
        parameters = {id(t): t for t in program.state_dict.values() if isinstance(t, nn.Parameter)}
        for name in changed:
            parameters.pop(id(program.state_dict.get(name)), None)
        given = (tuple(example[0]), dict(example[1]))
        _check(lambda one: copy.deepcopy(one, dict(parameters)).module(), program, twin, given, report)
    _finish(twin, report, start)
    return twin


def _attribute(module: nn.Module, name: str) -> Any:
    path, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(path), leaf, None)


class _Looking(fx.Interpreter):
    """Runs a graph and leaves on each node what it gave."""

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        if isinstance(found, torch.Tensor):
            n.meta[SEEN] = found.detach()
        return found


def _look(apart: nn.Module, twin: fx.GraphModule, example: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    """Leave on the nodes of the twin what those of its copy gave."""
    assert isinstance(apart, fx.GraphModule)
    bound = list(example[0])
    names = [str(node.target) for node in twin.graph.find_nodes(op="placeholder")]
    bound += [example[1][name] for name in names[len(bound) :] if name in example[1]]
    try:
        run_apart(_Looking(apart).run, bound, {})
    except Exception as error:  # the user's graph may raise anything
        raise MoecError(
            "MOEC211", f"the graph does not run on example_inputs: {type(error).__name__}: {error}",
            hint="example_inputs is a tuple of positional or a dict of keyword arguments of the model's forward",
        ) from error  # fmt: skip
    for node, ran in zip(twin.graph.nodes, apart.graph.nodes, strict=True):
        if SEEN in ran.meta:
            node.meta[SEEN] = ran.meta[SEEN]


def _check(
    apart: Callable[[Any], nn.Module],
    before: Any,
    after: Any,
    example: tuple[tuple[Any, ...], dict[str, Any]],
    report: Report,
) -> None:
    """Copies of the whole graph and the original on copies of the example: results, and what both write to.

    Raises MOEC221 where they differ.
    """

    def run(model: Any) -> Any:
        one = apart(model)
        return run_apart(one, *example), dict(one.named_buffers())

    found = judge(run(after), run(before), report)
    if found:
        raise MoecError("MOEC221", f"the rewritten graph differs from the original: {found}")


def _finish(result: Any, report: Report, start: float) -> None:
    report.seconds = time.perf_counter() - start
    result.moec = GraphHandle(report)


class GraphHandle:
    """What a compiled graph carries as `.moec`."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def __repr__(self) -> str:
        return f"<moec: {len(self.report.compiled)} of {len(self.report.layers)} layers compiled>"
