"""How a layer of an ONNX file is told its experts, as nodes: what a region reads, from the values of the graph.

T tokens, K experts per token, E experts, D model width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moec.backends.onnx.emitter import Emitter
from moec.exporter.facts import Facts, facts_of
from moec.exporter.routers import SoftmaxRouter, router_of
from moec.frontends.onnx.layer import Layer, Run


def region_inputs(emit: Emitter, layer: Layer) -> list[Any]:
    """x[T, D], and experts[T, K] and weights[T, K] of a mixture."""
    x = emit.reshape(layer.x, -1, layer.width)
    if layer.form == "dense":
        return [x]
    if layer.form == "logits":
        return [x, *_by_logits(emit, layer)]
    ids = _ids(emit, layer)
    if layer.form == "slots":
        return [x, ids, _weights(emit, layer, ids)]
    gates = layer.routing
    if layer.form == "places":
        gates = emit.op("ReduceSum", gates, emit.ints(-1), keepdims=0, name="gates")
    gates = emit.reshape(gates, -1, layer.experts)
    wide = emit.cast(ids, "i64")
    weights = emit.op("GatherElements", gates, wide, axis=1, name="weights")
    dtype = layer.region.inputs[2].type.dtype
    asked = emit.op("Not", emit.op("Equal", weights, emit.scalar(0, dtype)))
    # A token that was dropped is nobody's: its rows are not computed at all.
    return [x, emit.op("Where", asked, wide, emit.number(layer.experts), name="experts"), weights]


def _ids(emit: Emitter, layer: Layer) -> Any:
    parts = [emit.reshape(value, -1, layer.k if len(layer.ids) == 1 else 1) for value in layer.ids]
    return parts[0] if len(parts) == 1 else emit.op("Concat", *parts, axis=1, name="experts")


def _weights(emit: Emitter, layer: Layer, ids: Any) -> Any:
    if layer.routing is not None:
        return emit.reshape(layer.routing, -1, layer.k)
    dtype = layer.region.inputs[2].type.dtype
    ones = emit.op("Expand", emit.scalar(1, "f32"), emit.op("Shape", ids))
    return ones if dtype == "f32" else emit.cast(ones, dtype)


def _by_logits(emit: Emitter, layer: Layer) -> list[Any]:
    """Softmax, the K largest, and their weights."""
    assert layer.router is not None
    dtype = layer.region.inputs[2].type.dtype
    logits = emit.reshape(layer.routing, -1, layer.experts)
    wide = logits if dtype == "f32" else emit.cast(logits, "f32")
    if layer.router.normalize:
        best, ids = emit.op_many("TopK", 2, wide, emit.ints(layer.k), axis=1, name="top")
        weights = emit.op("Softmax", best, axis=1, name="weights")
    else:
        chances = emit.op("Softmax", wide, axis=1, name="chances")
        weights, ids = emit.op_many("TopK", 2, chances, emit.ints(layer.k), axis=1, name="top")
    return [ids, weights if dtype == "f32" else emit.cast(weights, dtype)]


def facts_about(layer: Layer, run: Run) -> Facts:
    """What is known of the experts and weights that `region_inputs` gives; `run` has the layer's scores."""
    if layer.form == "dense":
        return Facts()
    if layer.form == "logits":
        assert layer.router is not None
        return Facts(chosen=True, nonnegative=True, sums_to_one=layer.router.normalize)
    if layer.form == "slots" and len(layer.ids) == 1:
        found = facts_of(layer.ids[0], layer.routing, layer.experts)
        # A router may have columns that are no expert, which no run happened to choose.
        return replace(found, chosen=found.chosen or _columns(layer, run) == layer.experts)
    told = facts_of(layer.ids[0], layer.routing, layer.experts)
    return Facts(nonnegative=told.nonnegative)


def _columns(layer: Layer, run: Run) -> int:
    """How many there are to choose among."""
    choice = layer.ids[0].producer()
    axis, default = choice.attributes.get("axis"), -1 if choice.op_type == "TopK" else 0
    return int(run[layer.scores.name].shape[default if axis is None else axis.as_int()])


def router_about(layer: Layer) -> SoftmaxRouter | None:
    """The layer's router, where the graph proves it to be a softmax over logits that it has."""
    if layer.form == "logits":
        assert layer.router is not None
        return SoftmaxRouter(layer.routing, layer.router.normalize)
    if layer.form == "slots" and len(layer.ids) == 1:
        return router_of(layer.ids[0], layer.routing, layer.experts, layer.region.inputs[0].type.dtype)
    return None
