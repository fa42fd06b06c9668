"""The original part of a graph alone, in ONNX Runtime, against the region that it was lifted to.

T tokens, K experts per token, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from moec.backendbase import load_backend
from moec.backends.onnx.runtime import session
from moec.exporter.check import Check
from moec.exporter.probes import region_probes
from moec.frontends.onnx.read import Layer

# Clamps hide at unit scale.
SCALES = (1.0, 0.05, 60.0)
BAR = 1e-5


def confirm(model: Any, layer: Layer, feed: Mapping[str, Any]) -> Check:
    """Routings and scales the file itself would not meet; `feed` gives what else the part reads, such as shapes."""
    check = Check(bar=BAR, loose=10.0)
    given = [value for value in (layer.x, layer.ids, layer.routing) if value is not None]
    try:
        part, more = _extract(model, given, layer.y)
    except Exception as error:  # onnx-ir raises what it likes for a part that is not one
        check.why = f"its part of the graph cannot be cut out: {str(error).splitlines()[0][:160]}"
        return check
    shapes = {value.name: _recorded(model, value, feed) for value in given}
    tokens = shapes[layer.ids.name].size // layer.region.inputs[1].type.shape[1].evaluate({})
    runtime, judge = session(part), load_backend("reference").build(layer.region, layer.weights, {})
    for label, inputs in region_probes(layer.region):
        if "no token" in label or (len(inputs[0]) != tokens and more):
            continue
        x, ids, weights = inputs
        ids = _distinct(ids, len(layer.weights.experts("w_in"))).int() if label.startswith(("all on", "equal")) else ids
        _compare(check, label, layer, runtime, judge, (x, ids, weights), shapes, {name: feed[name] for name in more})
    rounds = -(-len(layer.weights.experts("w_in")) // tokens)
    for scale in SCALES:
        for turn in range(rounds):
            x, ids, weights = _fixed_size(layer, tokens, turn)
            given_here = {name: feed[name] for name in more}
            _compare(check, f"scale {scale:g}", layer, runtime, judge, (x * scale, ids, weights), shapes, given_here)
    return check


def _extract(model: Any, given: list[Any], y: Any) -> tuple[Any, list[str]]:
    """A model of what lies between, and the names of the file's own inputs that it reads besides."""
    reads = _reads(model, given, y)
    graph = ir.convenience.extract(model.graph, inputs=[v.name for v in [*given, *reads]], outputs=[y.name])
    graph.opset_imports.update(model.opset_imports)
    return ir.Model(graph, ir_version=model.ir_version), [value.name for value in reads]


def _reads(model: Any, given: list[Any], y: Any) -> list[Any]:
    """Inputs of the file that y depends on otherwise than through the given values."""
    inputs, found = set(model.graph.inputs), dict[Any, None]()
    seen, todo = set(given), [y]
    while todo:
        value = todo.pop()
        if value in seen or value is None:
            continue
        seen.add(value)
        if value in inputs:
            found[value] = None
        elif value.producer() is not None:
            todo += value.producer().inputs
    return list(found)


def _recorded(model: Any, value: Any, feed: Mapping[str, Any]) -> Any:
    """The value in the run of the whole file."""
    if value.name in feed:
        return feed[value.name]
    outputs = model.graph.outputs
    count = len(outputs)
    outputs.append(value)
    try:
        runtime = session(model)
    finally:
        del outputs[count:]
    known = {one.name for one in runtime.get_inputs()}
    return runtime.run(None, {k: v for k, v in feed.items() if k in known})[-1]


def _fixed_size(layer: Layer, tokens: int, turn: int) -> list[torch.Tensor]:
    """Random inputs of the region with this many tokens, which go through all experts in turns."""
    generator = torch.Generator().manual_seed(turn)
    experts = len(layer.weights.experts("w_in"))
    width, k = layer.region.inputs[0].type.shape[1].evaluate({}), layer.region.inputs[1].type.shape[1].evaluate({})
    first = torch.arange(tokens) + turn * tokens
    ids = (first.unsqueeze(1) + torch.arange(k)) % experts
    return [torch.randn(tokens, width, generator=generator), ids.int(), torch.rand(tokens, k, generator=generator)]


def _distinct(ids: torch.Tensor, experts: int) -> torch.Tensor:
    """A router never chooses an expert twice, and the graph may rest on that."""
    return (ids[:, :1] + torch.arange(ids.shape[1])) % experts


def _compare(
    check: Check,
    label: str,
    layer: Layer,
    runtime: Any,
    judge: Any,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    shapes: Mapping[str, Any],
    more: Mapping[str, Any],
) -> None:
    x, ids, weights = inputs
    weights = weights if layer.routing is not None else torch.ones_like(weights)
    tokens = len(x)
    feed: dict[str, Any] = dict(more)
    values = [(layer.x, x), (layer.ids, ids), (layer.routing, weights)]
    for value, tensor in values:
        if value is not None:
            like = shapes[value.name]
            fits = tensor.numel() == like.size
            shape = like.shape if fits else (tokens, *like.shape[1:])
            feed[value.name] = tensor.numpy().reshape(shape).astype(like.dtype)
    (theirs,) = judge(x, ids, weights)
    try:
        mine = runtime.run(None, feed)[0]
    except Exception as error:  # ONNX Runtime's errors have no common class
        check.why = check.why or f"{label}: {str(error).splitlines()[0][:160]}"
        return
    check.labels.append(label)
    check.add(label, torch.from_numpy(np.ascontiguousarray(mine)).reshape(theirs.shape), theirs)
