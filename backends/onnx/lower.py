"""A region as ONNX: nodes for a graph that exists, or a model of its own.

T tokens, K experts per token, E experts, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch

from moec.backendbase import Weights
from moec.backends.onnx.emitter import DTYPES, OPSET, Emitter
from moec.backends.onnx.form import EXACT, Form
from moec.backends.onnx.lowering import Lowering
from moec.backends.onnx.table import LOWERINGS, unsupported
from moec.backends.reference.frame import Frame
from moec.backends.reference.joined import Experts
from moec.backends.reference.steps import Step, constant_nodes
from moec.backends.reference.weights import LiveWeight, per_expert
from moec.errors import MoecError
from moec.ir import Region, Route, RouteExperts, Tensor, Weight, verify


def lower(
    region: Region,
    weights: Weights,
    emit: Emitter,
    inputs: Sequence[Any],
    *,
    form: Form = EXACT,
    chosen: Sequence[str] = (),
    sums_to_one: Sequence[str] = (),
) -> list[Any]:
    """Append the region's nodes to `emit`, over these values for its inputs; gives the values of its outputs.

    `chosen` names inputs whose ids are known to be experts, `sums_to_one` weights that do for every token. Raises
    MOEC403 for an op without a lowering, MOEC405 for a weight that is not as declared.
    """
    verify(region)
    check(region)
    low = Lowering(emit, held_weights(region, weights), form=form)
    low.chosen.update(chosen)
    low.sums_to_one.update(sums_to_one)
    for value, found in zip(region.inputs, inputs, strict=True):
        low.values[value.name] = found
        for axis, size in enumerate(value.type.shape):
            if size.letters - set(emit.letters):
                emit.bind(size, emit.shape_of(found, axis))
    for node in region.nodes:
        if node.op.of_weights:
            continue
        if isinstance(node.op, Route) and form.router:
            low.routers[node.results[0].name] = node.op
            continue
        low.define(node.results, LOWERINGS[type(node.op)](node.op, low))
        if isinstance(node.op, Route):
            low.chosen.add(node.results[1].name)
            if _sums_to_one(node.op):
                low.sums_to_one.add(node.results[0].name)
    return [low.value(value) for value in region.outputs]


def _sums_to_one(op: Route) -> bool:
    """Whether each token's weights do, whatever the logits."""
    normalized = op.normalize == "sum" and op.eps == 0
    return op.scale == 1 and (normalized or (op.score == "softmax_chosen" and op.normalize == "none"))


def check(region: Region) -> None:
    """Raise MOEC403 for the first op that ONNX cannot say."""
    known = {node.results[0].name for node in region.nodes if isinstance(node.op, Weight)}
    for number, node in enumerate(region.nodes, start=2):
        reason = unsupported(node.op)
        if reason is None and node.op.of_weights and not isinstance(node.op, Weight):
            if not known.issuperset(value.name for value in node.op.operands):
                reason = "what it takes is not known until it runs"
            known.update(value.name for value in node.results)
        if isinstance(node.op, RouteExperts) and node.op.capacity.constant == 0:
            reason = "a capacity of 0"
        if reason is not None:
            where = f"line {number}: {node}"
            raise MoecError("MOEC403", f"{node.op.name}: back end onnxruntime cannot: {reason}", where=where)


def held_weights(region: Region, weights: Weights) -> dict[str, Experts]:
    """Everything in the region that depends on weights only, computed by the ops' meanings; views where they are."""
    of_experts = per_expert(region)
    held: dict[str, Experts] = {}
    for node in region.nodes:
        if isinstance(node.op, Weight):
            live = LiveWeight(weights, node.op, of_experts=node.results[0].name in of_experts)
            live.check()
            held[node.results[0].name] = live.read()
    at = Frame(held, {}, {})
    with torch.no_grad():
        for node in constant_nodes(region):
            Step(node, None, ()).run(at)
    return at.values


def region_model(region: Region, weights: Weights, *, form: Form = EXACT) -> Any:
    """The region alone as an onnx-ir model; its inputs and outputs have the names they have in the IR."""
    emit = Emitter(region.name)
    inputs = [ir.Value(name=v.name, shape=_shape(v.type), type=_type(v.type)) for v in region.inputs]
    outputs = []
    for value, found in zip(region.outputs, lower(region, weights, emit, inputs, form=form), strict=True):
        named = emit.op("Identity", found)
        named.name, named.shape, named.type = f"out:{value.name}", _shape(value.type), _type(value.type)
        outputs.append(named)
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=emit.nodes,
        initializers=emit.initializers,
        opset_imports={"": OPSET, **emit.domains},
        name=region.name,
    )
    return ir.Model(graph, ir_version=10, producer_name="moec")


def _shape(type: Tensor) -> Any:
    """Sizes that are letters with numbers keep their text as the name of the dimension."""
    return ir.Shape([size.constant if size.constant is not None else str(size) for size in type.shape])


def _type(type: Tensor) -> Any:
    return ir.TensorType(DTYPES[type.dtype])
