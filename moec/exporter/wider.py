"""Results in a wider type than their input: torch widens first, torch's ONNX exporter computes and then widens.

`softmax(logits, dtype=torch.float32)` of logits in 16 bits is what most routers do. Computed in 16 bits it makes equal
what was not, and then other experts are chosen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
_WITH_DTYPE = (
    aten.softmax.int, aten.log_softmax.int, aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim,
    aten.prod.default, aten.prod.dim_int, aten.cumsum.default, aten.cumprod.default,
)  # fmt: skip


def widen_first(program: Any) -> None:
    """Put the cast in front of each such op of an exported program, in place; this is what the op means."""
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in list(module.graph.nodes):
                _widen(module.graph, node)
            module.recompile()


def _widen(graph: fx.Graph, node: fx.Node) -> None:
    if node.op != "call_function" or node.target not in _WITH_DTYPE or not isinstance(node.args[0], fx.Node):
        return
    given, found = node.args[0].meta.get("val"), node.meta.get("val")
    if not isinstance(given, torch.Tensor) or not isinstance(found, torch.Tensor):
        return
    if not given.is_floating_point() or given.dtype == found.dtype:
        return
    with graph.inserting_before(node):
        cast = graph.call_function(aten.to.dtype, (node.args[0], found.dtype))
    cast.meta = {**node.meta, "val": given.to(found.dtype)}
    node.args = (cast, *node.args[1:])
