"""A compiled layer written into a graph in the place of the part it was found in."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from moec.frontends.fx.outline import SEEN
from moec.frontends.fx.regions import Part, is_assertion, value_of
from moec.frontends.torch.graphed import Graphed

_Tracer = fx.proxy.GraphAppendingTracer
_OF_ORIGIN = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn")


class _Reader:
    """Stands for the module of a cut: its attributes are the graph's nodes for its weights, its submodules calls."""

    def __init__(self, nodes: Mapping[str, fx.Node], host: nn.Module, tracer: _Tracer, path: str = "") -> None:
        self._nodes, self._host, self._tracer, self._path = nodes, host, tracer, path

    def __getattr__(self, name: str) -> Any:
        path = f"{self._path}.{name}".lstrip(".")
        if path in self._nodes:
            return fx.Proxy(self._nodes[path], self._tracer)
        owner, _, leaf = path.rpartition(".")
        if any(one.startswith(path + ".") for one in self._nodes):
            return _Reader(self._nodes, self._host, self._tracer, path)
        if isinstance(getattr(self._host.get_submodule(owner), leaf), torch.Tensor):
            return self._tracer.create_proxy("get_attr", path, (), {})
        return _Reader(self._nodes, self._host, self._tracer, path)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._tracer.create_proxy("call_module", self._path, args, kwargs)


def splice(graph: fx.Graph, part: Part, found: Graphed, names: Mapping[str, fx.Node], host: nn.Module) -> fx.Node:
    """Write the layer behind the part's last node and let it take over; returns the node that gives its result."""
    before = set(graph.nodes)
    tracer = _Tracer(graph)
    with graph.inserting_after(part.inside[-1]):
        anchor = graph.call_function(torch.ops.aten.sym_size.int, (part.x, 0))
    with graph.inserting_before(anchor):
        reader = _Reader(names, host, tracer)
        given = [fx.Proxy(part.x, tracer), None, None][: len(found.written.inputs)]
        result = found.write(reader, found.params(reader), "", _sizes(part.x, tracer), given)  # type: ignore[arg-type]
    graph.erase_node(anchor)
    assert isinstance(result, fx.Proxy), "the layer has other results than its part"
    made = [node for node in graph.nodes if node not in before]
    for node in made:
        node.meta.update({key: part.y.meta[key] for key in _OF_ORIGIN if key in part.y.meta})
        _describe(node)
    result.node.meta.update(part.y.meta)
    part.y.replace_all_uses_with(result.node)
    for node in [user for one in part.inside for user in one.users if is_assertion(user)]:
        graph.erase_node(node)
    for node in reversed(part.inside):
        if not node.users:
            graph.erase_node(node)
    return result.node


def _sizes(x: fx.Node, tracer: _Tracer) -> Any:
    def sizes(proxy: Any) -> tuple[Any, ...]:
        known = value_of(x)
        rank = known.dim() if isinstance(known, torch.Tensor) else x.meta[SEEN].dim()
        return tuple(
            known.shape[i]
            if isinstance(known, torch.Tensor) and isinstance(known.shape[i], int)
            else torch.ops.aten.sym_size.int(proxy, i)
            for i in range(rank)
        )

    return sizes


def _describe(node: fx.Node) -> None:
    """What the new node gives, where that is known of its inputs; graphs of torch.export need it."""
    inputs = [one.meta.get("val") for one in node.all_input_nodes]
    mode = next((value.fake_mode for value in tree_leaves(inputs) if isinstance(value, FakeTensor)), None)
    if node.op != "call_function" or not inputs or any(value is None for value in inputs):
        return
    args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
    with mode if mode is not None else nullcontext(), torch.no_grad():  # sizes alone need no mode
        node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
