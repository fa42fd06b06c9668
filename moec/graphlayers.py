"""Layers found in a graph and written anew: candidates by their weights, parts around those, each verified by value."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from moec.compiler import choose_backend, compile_layer
from moec.environment import machine, versions
from moec.errors import MoecError
from moec.frontends.fx.memory import Memory
from moec.frontends.fx.outline import Outlined, Weight, example_of, outline, shared_path
from moec.frontends.fx.regions import Flow, Part, value_of
from moec.frontends.fx.splice import splice
from moec.frontends.fx.widen import widened
from moec.frontends.torch.analyse import analyse
from moec.frontends.torch.discover import Candidate, discover_moe
from moec.frontends.torch.effects import Watch
from moec.frontends.torch.graphed import Graphed
from moec.frontends.torch.guard import has_modes
from moec.frontends.torch.instances import NotLifted
from moec.frontends.torch.refuse import check_weights
from moec.options import Options
from moec.report import LayerReport, Report
from moec.verify import bar_for, compare_results

Uses = dict[str, tuple[fx.Node, torch.Tensor]]
"""By name: the node that holds a weight, or the call of the module that has it."""
Replaced = Callable[[fx.Node, fx.Node], None]
# Of the probes of a part at the sizes of its graph: clamps hide at unit scale.
_SCALES = (1.0, 0.05, 8.0, 60.0)


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
    modal = modal_call(part, host)
    if x is None or modal:
        report.layers[-1].reason = modal or "nothing is known of its input; pass example_inputs"
        return False
    outlined = outline(part, weights, candidate.weights, host)
    made = _look(outlined, outlined, candidate, x, options, backend)
    wider = widened(outlined, x.shape) if not made.layer.compiled and _is_fixed(part.x) else None
    if wider is not None:
        again = _look(wider, outlined, candidate, x, options, backend)
        made = again if again.layer.compiled else made
    report.layers[-1] = made.layer
    if made.graphed is None or not made.layer.compiled:
        return False
    new = splice(graph, part, made.graphed, outlined.names, host)
    if replaced is not None:
        replaced(part.y, new)
    return True


@dataclass(frozen=True)
class _Looked:
    """What was found in a part; `graphed` is there where it is compiled."""

    layer: LayerReport
    graphed: Graphed | None = None


def _look(
    outlined: Outlined, written: Outlined, candidate: Candidate, x: torch.Tensor, options: Options, backend: str
) -> _Looked:
    """The part as a layer; where it is a guess at what is `written`, it must give the same at the sizes of x."""
    watch = Watch(outlined.module)
    try:
        found = analyse(outlined.module, ((x,), {}), lambda _: None)
        lifted = next((one for one in found.lifted if one.name == ""), None)
        if lifted is None:
            return _left(candidate, "; ".join(one.reason for one in found.refused) or "it is no layer")
        made = compile_layer(lifted, options, backend, for_graph=True)
        made.layer.name = candidate.name
        if made.layer.compiled and (made.graphed is None or (options.training and made.graphed.no_gradients)):
            made.layer.status, made.layer.reason = "left alone", made.layer.evidence[-1]  # has why
        if made.layer.compiled and made.graphed is not None and outlined is not written:
            why = _differs(made.graphed, outlined, written, x, bar_for(lifted.dtype, lifted.longest))
            if why:
                made.layer.status, made.layer.reason = "left alone", why
            made.layer.evidence = (*made.layer.evidence, f"sizes are fixed to {tuple(x.shape)}, where it was compared")
    except MoecError as error:
        return _left(candidate, error.message)
    finally:
        watch.undo()
    return _Looked(made.layer, made.graphed)


def _left(candidate: Candidate, reason: str) -> _Looked:
    return _Looked(LayerReport(name=candidate.name, kind=candidate.kind, status="left alone", reason=reason))


def _differs(graphed: Graphed, guess: Outlined, written: Outlined, x: torch.Tensor, bar: float) -> str:
    """How the layer differs from the part as it is written, at the sizes that it has; empty if it does not."""
    for seed, scale in enumerate(_SCALES):
        generator = torch.Generator().manual_seed(seed)
        tokens = (torch.randn(x.shape, generator=generator) * scale).to(x.device, x.dtype)
        try:
            with torch.no_grad():
                found = compare_results(graphed.run(guess.module, "", (tokens,), {}), written.module(tokens))
        except Exception as error:  # the user's operations may raise anything
            return f"at the sizes of the graph: {type(error).__name__}: {error}"
        if found.mismatch or not found.l2 <= bar:
            return f"at the sizes of the graph and scale {scale}: {found.mismatch or f'error {found.l2:.1e}'}"
    return ""


def _is_fixed(x: fx.Node) -> bool:
    """Whether x is known to have the same sizes in every run."""
    known = value_of(x)
    return isinstance(known, torch.Tensor) and all(type(size) is int for size in known.shape)


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
