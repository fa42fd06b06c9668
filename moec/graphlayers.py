"""Layers found in a graph and written anew: candidates by their weights, parts around those, each verified by value."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import fx, nn

from moec.compiler import choose_backend, compile_layer
from moec.environment import machine, versions
from moec.errors import MoecError
from moec.frontends.fx.memory import Memory
from moec.frontends.fx.outline import Weight, example_of, outline, shared_path
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

Uses = dict[str, tuple[fx.Node, torch.Tensor]]
"""By name: the node that holds a weight, or the call of the module that has it."""
Replaced = Callable[[fx.Node, fx.Node], None]


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
        made = compile_layer(lifted, options, backend, for_graph=True)
    except MoecError as error:
        report.layers[-1].reason = error.message
        return False
    finally:
        watch.undo()
    made.layer.name = candidate.name
    report.layers[-1] = made.layer
    if made.layer.compiled and (made.graphed is None or (options.training and made.graphed.no_gradients)):
        made.layer.status, made.layer.reason = (
            "left alone",
            made.layer.evidence[-1],
        )  # why it has no form or no backward
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


def memory_of(graph: fx.Graph, weights: Mapping[fx.Node, Weight], host: nn.Module) -> Memory:
    """What shares memory in the graph."""
    return Memory(graph, host, {node: weight.tensor for node, weight in weights.items()})


def written_weights(graph: fx.Graph, weights: Mapping[fx.Node, Weight], host: nn.Module) -> set[int]:
    """The ids of the weights that the graph itself may write to."""
    memory = memory_of(graph, weights, host)
    return {id(weights[node].tensor) for write in memory.writes for node in memory.written(write) if node in weights}
