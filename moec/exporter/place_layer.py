"""One proved layer of an ONNX graph, rewritten in its place, or left with the reason.

T tokens, K experts per token, D model width.
"""

from __future__ import annotations

import ast
from dataclasses import replace
from typing import Any

from moec.backends.onnx import defects
from moec.backends.onnx.emitter import Emitter
from moec.backends.onnx.lower import lower
from moec.errors import MoecError
from moec.exporter.check import Check
from moec.exporter.confirm import confirm
from moec.exporter.facts import Facts
from moec.exporter.insert import known, put_before
from moec.exporter.lowerings import place
from moec.exporter.placed import Placed
from moec.exporter.result import ExportedLayer, ExportReport
from moec.exporter.routed import facts_about, region_inputs, router_about
from moec.exporter.settings import Settings
from moec.exporter.slower import slower_alone
from moec.frontends.onnx.layer import DTYPES, Layer, Run


def path_of(layer: Layer) -> str:
    """The module that the layer came from, where the exporter wrote that down."""
    node = layer.y.producer()
    try:
        scopes = [one for one in ast.literal_eval(node.metadata_props["pkg.torch.onnx.name_scopes"]) if one]
        return str(scopes[-2])
    except (KeyError, ValueError, SyntaxError, IndexError):
        return layer.name


def place_layer(model: Any, layer: Layer, run: Run, settings: Settings, report: ExportReport, *, timed: bool) -> bool:
    """Rewrite one layer in the graph, if everything about it holds."""
    told = ExportedLayer(name=layer.name, kind=layer.kind, status="left alone", evidence=layer.evidence)
    report.layers.append(told)
    if layer.kept and settings.quantize is None:
        told.reason = layer.kept
        return False
    if layer.doubt and any(one.name in layer.doubt and one.status != "right" for one in defects.examine()):
        told.reason = layer.doubt
        return False
    x, y = run[layer.x.name], run[layer.y.name]
    if y.ndim not in (2, x.ndim):
        told.reason = f"its result has {y.ndim} dimensions and its input {x.ndim}"
        return False
    layer, proof = _confirmed(model, layer, run)
    if not proof.passed:
        told.reason = f"the region differs from the graph at {proof.why}" if proof.labels else proof.why
        return False
    placed = place(layer.region, layer.weights, settings, told, 2e-6)
    if placed is None:
        raise MoecError("MOEC704", f"no way to write {layer.name} passed its check", where="; ".join(told.tried))
    facts = facts_about(layer, run)
    placed = replace(placed.settled(facts, router_about(layer)), name=layer.name)
    told.reason = slower_alone(model, layer, placed, run, settings) if timed else ""
    if told.reason:
        told.status, told.lowering = "left alone", ""
        return False
    _put(model.graph, layer, placed, facts, run[layer.y.name])
    return True


def _confirmed(model: Any, layer: Layer, run: Run) -> tuple[Layer, Check]:
    """The layer with the values that its result is really computed from, among those that were equal."""
    first = None
    for x, routing in layer.alike or ((layer.x, layer.routing),):
        one = replace(layer, x=x, routing=routing)
        proof = confirm(model, one, run)
        if proof.passed:
            return one, proof
        first = first or proof
    assert first is not None
    return layer, first


def _put(graph: Any, layer: Layer, placed: Placed, facts: Facts, like: Any) -> None:
    """The region in front of the node that gives its result, which then nobody reads; `like` is such a result."""
    emit = Emitter(layer.name)
    inputs = placed.inputs(emit, region_inputs(emit, layer))
    (y,) = lower(placed.region, placed.weights, emit, inputs, form=placed.form, **known(placed.region, facts))
    if DTYPES[str(like.dtype)] != layer.region.outputs[0].type.dtype:
        y = emit.cast(y, DTYPES[str(like.dtype)])
    if like.ndim != 2:
        y = emit.op("Reshape", y, emit.op("Shape", layer.x), allowzero=1)
    emit.nodes[-1].doc_string = f"moec: {layer.name}\n{placed.region}"
    put_before(graph, layer.y.producer(), emit)
    y.shape, y.type = layer.y.shape, layer.y.type
    layer.y.replace_all_uses_with(y, replace_graph_outputs=True)
