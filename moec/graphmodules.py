"""moec.compile of graphs: fx.GraphModule and ExportedProgram. Layers are rewritten, everything else stays as it is."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from moec.compiler import choose_backend, compile_layer
from moec.environment import machine, versions
from moec.errors import MoecError
from moec.frontends.fx.apart import judge, module_apart, run_apart
from moec.frontends.fx.memory import Memory
from moec.frontends.fx.outline import SEEN, Weight, example_of, outline, shared_path
from moec.frontends.fx.regions import Flow, Part
from moec.frontends.fx.splice import splice
from moec.frontends.torch.analyse import analyse
from moec.frontends.torch.discover import Candidate, discover_moe
from moec.frontends.torch.effects import Watch
from moec.frontends.torch.guard import has_modes
from moec.frontends.torch.instances import NotLifted
from moec.frontends.torch.refuse import check_weights
from moec.options import Options
from moec.report import LayerReport, Report

Example = tuple[tuple[Any, ...], dict[str, Any]] | None
Uses = dict[str, tuple[fx.Node, torch.Tensor]]
"""By name: the node that holds a weight, or the call of the module that has it."""
Replaced = Callable[[fx.Node, fx.Node], None]


def is_graph(model: Any) -> bool:
    """Whether it is something that compile_graph takes."""
    return isinstance(model, fx.GraphModule | torch.export.ExportedProgram)


def compile_graph(model: Any, example: Example, options: Options) -> Any:
    """A copy of an fx.GraphModule or ExportedProgram over the same tensors, its layers rewritten, with `.moec.report`.

    Raises MOEC503 for options that graphs do not have, MOEC211 for an example that the graph does not run on, MOEC220
    under strict, and MOEC221 where the whole graph differs on the example.
    """
    for name in ("inplace", "training", "measure"):
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


def rewrite(
    graph: fx.Graph,
    weights: Mapping[fx.Node, Weight],
    host: nn.Module,
    options: Options,
    replaced: Replaced | None = None,
) -> Report:
    """Rewrite the layers of a graph in place; the report has every candidate."""
    device = next((w.tensor.device for w in weights.values()), torch.device("cpu"))
    backend, why = choose_backend(options, device)
    report = Report(versions=versions(), machine=machine(), notes=[why] if why else [])
    holder = _holder(_uses(graph, weights, host))
    for candidate in _candidates(holder, graph, weights, host, report):
        layer = LayerReport(name=candidate.name, kind=candidate.kind, status="left alone")
        report.layers.append(layer)
        try:
            check_weights(holder, candidate.name, candidate.weights)
        except NotLifted as reason:
            layer.reason = str(reason)
            continue
        uses = _uses(graph, weights, host)  # calls of modules are other nodes once a part was written anew
        own = {uses[name][0] for name in candidate.weights if name in uses}
        flow = Flow(graph, memory_of(graph, weights, host), weights)
        for part in flow.parts(own):
            if isinstance(part, str):
                layer.reason = layer.reason or part
                break
            if _try(graph, part, weights, candidate, host, options, backend, report, replaced):
                break
    if options.strict:
        for layer in report.layers:
            if not layer.compiled:
                hint = "without strict=True the other layers are compiled"
                raise MoecError("MOEC220", f"{layer.name or 'the graph'} was left alone: {layer.reason}", hint=hint)
    return report


def _try(
    graph: fx.Graph, part: Part, weights: Mapping[fx.Node, Weight], candidate: Candidate, host: nn.Module,
    options: Options, backend: str, report: Report, replaced: Replaced | None,
) -> bool:  # fmt: skip
    """Look at one part; the last line of the report becomes what was found."""
    x = example_of(part.x)
    modal = modal_call(part, host) if x is not None else "nothing is known of its input; pass example_inputs"
    if modal:
        report.layers[-1].reason = modal
        return False
    outlined = outline(part, weights, candidate.weights, host)
    watch = Watch(outlined.module)
    try:
        found = analyse(outlined.module, ((x,), {}), lambda _: None)
        lifted = next((one for one in found.lifted if one.name == ""), None)
        if lifted is None:
            report.layers[-1].reason = "; ".join(one.reason for one in found.refused) or "it is no layer"
            return False
        made = compile_layer(lifted, options, backend)
    except MoecError as error:
        report.layers[-1].reason = error.message
        return False
    finally:
        watch.undo()
    made.layer.name = candidate.name
    if made.layer.compiled and made.graphed is None:
        made.layer.status, made.layer.reason = "left alone", made.layer.evidence[-1]
    report.layers[-1] = made.layer
    if made.graphed is None or not made.layer.compiled:
        return False
    new = splice(graph, part, made.graphed, outlined.names, host)
    if replaced is not None:
        replaced(part.y, new)
    return True


def _candidates(
    holder: nn.Module, graph: fx.Graph, weights: Mapping[fx.Node, Weight], host: nn.Module, report: Report
) -> Iterator[Candidate]:
    """Mixtures, and then plain FFNs among the weights that no mixture has taken."""
    taken: set[str] = set()
    for candidate in discover_moe(holder):
        yield candidate
        if report.layers[-1].compiled:
            taken |= candidate.weights
    uses = {name: use for name, use in _uses(graph, weights, host).items() if name not in taken}
    for names in list(Flow(graph, memory_of(graph, weights, host), weights).pairs(uses)):
        yield Candidate(".".join(shared_path(names)), "ffn", set(names))


class _Holder(nn.Module):
    """Has weights, and a forward that nobody calls: what computes with them is a part of a graph."""

    def forward(self) -> None:
        raise NotImplementedError


def _uses(graph: fx.Graph, weights: Mapping[fx.Node, Weight], host: nn.Module) -> Uses:
    found: Uses = {}
    for node, weight in weights.items():
        if isinstance(weight.tensor, nn.Parameter):
            found.setdefault(weight.name, (node, weight.tensor))
    for node in graph.find_nodes(op="call_module"):
        for name, tensor in host.get_submodule(str(node.target)).named_parameters():
            found.setdefault(f"{node.target}.{name}", (node, tensor))
    return found


def _holder(uses: Uses) -> nn.Module:
    """The weights in modules as their names say."""
    root = _Holder()
    for name, (_, tensor) in uses.items():
        module, (*path, leaf) = root, name.split(".")
        for part in path:
            if part not in module._modules:
                module.add_module(part, _Holder())
            module = module._modules[part]  # type: ignore[assignment]
        if not hasattr(module, leaf):
            module.register_parameter(leaf, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor))
    return root


def modal_call(part: Part, host: nn.Module) -> str:
    """Why the part may be another function in training mode; empty if it is not."""
    for node in part.inside:
        if node.op == "call_module" and has_modes(host.get_submodule(str(node.target))):
            return f"{node.target} may do something else in training mode"
    return ""


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


def memory_of(graph: fx.Graph, weights: Mapping[fx.Node, Weight], host: nn.Module) -> Memory:
    """What shares memory in the graph."""
    return Memory(graph, host, {node: weight.tensor for node, weight in weights.items()})


def written_weights(graph: fx.Graph, weights: Mapping[fx.Node, Weight], host: nn.Module) -> set[int]:
    """The ids of the weights that the graph itself may write to."""
    memory = memory_of(graph, weights, host)
    return {id(weights[node].tensor) for write in memory.writes for node in memory.written(write) if node in weights}


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
