"""The back end of torch.compile called "moec": layers in a graph become `moec::layer`, inductor compiles the graph."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo import lookup_backend
from torch._subclasses.fake_tensor import FakeTensor

from moec.frontends.fx.apart import Copies, judge, seeded
from moec.frontends.fx.outline import Weight
from moec.graphlayers import rewrite, written_weights
from moec.options import Options
from moec.report import Report
from moec.undisturbed import undisturbed

_PART = re.compile(r"\['([^']+)'\]|\.([A-Za-z_]\w*)")
_TABLES = frozenset({"_modules", "_parameters", "_buffers"})

reports: list[Report] = []
"""What was found in each graph, newest last; the first of those that are too many are dropped."""
_MOST_REPORTS = 256


def moec_backend(
    graph: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """What `torch.compile(model, backend="moec")` calls with each graph.

    `options` are the fields of moec.Options, and "inner", the back end that compiles the rewritten graph ("inductor").
    A graph without a layer goes there as it is. In one that is recorded for a backward, layers are rewritten whose
    gradients are the original's, as with training=True.
    """
    given = dict(options or {})
    inner = lookup_backend(given.pop("inner", "inductor"))
    chosen = Options.make(**given, **({"mode": mode} if mode is not None else {}))
    with undisturbed():
        rewritten = _rewritten(graph, inputs, chosen)
    compiled: Callable[..., Any] = inner(rewritten if rewritten is not None else graph, list(inputs))
    return compiled


def _rewritten(graph: fx.GraphModule, inputs: Sequence[Any], options: Options) -> fx.GraphModule | None:
    """A copy of the graph with its layers rewritten; None where there is none, or where it is not the time."""
    if torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in inputs):
        options = replace(options, training=True)
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph.graph, {}))
    twin = fx.GraphModule(graph, copied)
    weights: dict[fx.Node, Weight] = {}
    for node, tensor in zip(twin.graph.find_nodes(op="placeholder"), inputs, strict=True):
        if isinstance(tensor, nn.Parameter) and not isinstance(tensor, FakeTensor):
            weights[node] = Weight(_name(node), tensor)
    for node in twin.graph.find_nodes(op="get_attr"):
        held = getattr(twin, str(node.target), None)
        if isinstance(held, torch.Tensor):
            weights[node] = Weight(str(node.target), held)
    if not weights:
        return None
    changed = written_weights(twin.graph, weights, twin)
    report = rewrite(twin.graph, weights, twin, options)
    reports.append(report)
    del reports[:-_MOST_REPORTS]
    if not report.compiled:
        return None
    twin.graph.lint()
    twin.recompile()
    return twin if _same(graph, twin, inputs, changed, report) else None


def _same(
    graph: fx.GraphModule, twin: fx.GraphModule, inputs: Sequence[Any], changed: set[int], report: Report
) -> bool:
    """Whether both graphs give and write the same on copies of the inputs they were traced with."""
    if any(isinstance(t, FakeTensor) for t in inputs):
        return True
    try:
        found = judge(_run(twin, inputs, changed), _run(graph, inputs, changed), report)
    except Exception as error:  # a graph may raise anything
        found = f"{type(error).__name__}: {error}"
    if found:
        warnings.warn(f"[MOEC221] a rewritten graph differs, so it is left alone: {found}", stacklevel=2)
        for layer in report.compiled:
            layer.status, layer.reason = "left alone", f"the whole graph differs: {found}"
    return not found


def _run(graph: fx.GraphModule, inputs: Sequence[Any], changed: set[int]) -> Any:
    """What the graph gives, and how it leaves all but the parameters that it does not write to."""
    kept = [isinstance(t, nn.Parameter) and id(t) not in changed for t in inputs]
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph.graph, {}))
    apart, copies = fx.GraphModule(graph, copied), Copies()
    for name in {str(node.target) for node in apart.graph.find_nodes(op="get_attr")}:
        held = getattr(apart, name, None)
        if isinstance(held, torch.Tensor) and not isinstance(held, nn.Parameter):
            setattr(apart, name, copies.of(held))
    given = [t if keep else copies.of(t) for t, keep in zip(inputs, kept, strict=True)]
    with torch.no_grad(), seeded():
        result = apart(*given)
    return result, [t for t, keep in zip(given, kept, strict=True) if not keep]


def _name(node: fx.Node) -> str:
    """The weight's name, from how torch.compile reached it, such as L['self']._modules['up']._parameters['weight']."""
    found: Any = getattr(getattr(node.meta.get("grapharg"), "source", None), "name", "")
    text = found() if callable(found) else str(found)
    parts = [a or b for a, b in _PART.findall(text)]
    kept = [part for part in parts[1:] if part not in _TABLES]  # the first is the local that holds the module
    return ".".join(kept) or node.name
