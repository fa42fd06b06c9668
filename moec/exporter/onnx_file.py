"""An ONNX file as a verified ONNX file with its MoE layers rewritten.

T tokens, K experts per token, D model width.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moec.backends.onnx import defects
from moec.backends.onnx.emitter import Emitter
from moec.backends.onnx.lower import lower
from moec.backends.onnx.providers import CPU, providers_of
from moec.backends.onnx.runtime import session
from moec.errors import MoecError
from moec.exporter.check import LEAST_AGREEMENT, MODEL_BAR, Check
from moec.exporter.confirm import confirm
from moec.exporter.facts import Facts
from moec.exporter.insert import forget_unused, known, put_before
from moec.exporter.invent import Feed, feeds
from moec.exporter.lowerings import place
from moec.exporter.placed import Placed
from moec.exporter.result import ExportedLayer, ExportReport
from moec.exporter.routed import facts_about, region_inputs, router_about
from moec.exporter.settings import Settings
from moec.exporter.slower import slower_alone
from moec.frontends.onnx.home import Home
from moec.frontends.onnx.layer import DTYPES, Layer, Run
from moec.frontends.onnx.load import load
from moec.frontends.onnx.read import read

Say = Callable[[str], None]
# Of files that compute in 16 bits.
LOW_MODEL_BARS = {"FLOAT16": 1e-2, "BFLOAT16": 6e-2}


@dataclass
class Rewritten:
    """The rewritten model as onnx-ir, and inputs to run it and the file on."""

    model: Any
    made: list[Made]
    home: Home | None = None
    """Where the weights of a large model lie."""


@dataclass
class Made:
    """Inputs, and what the file as it is makes of them."""

    label: str
    feed: Feed
    outputs: list[Any]


def rewrite(path: Path, settings: Settings, report: ExportReport, say: Say, *, timed: bool = False) -> Rewritten:
    """The file with its layers rewritten, checked. Raises MOEC601, 704, 705, 707 and 708.

    `timed` times each layer alone, and leaves those that would be slower as they are.
    """
    say("reading")
    model, home = load(path)
    try:
        before = session(path if home is None else model)
    except Exception as error:  # ONNX Runtime's errors have no common class
        reason = str(error).strip().splitlines()[0][:200]
        raise MoecError("MOEC707", f"{path} cannot be read: ONNX Runtime does not load it: {reason}") from error
    made = _those_that_run(before, feeds(model, settings.inputs, few=home is not None), settings.inputs)
    del before
    say("looking for layers")
    found = read(model, [one.feed for one in made], _rested(model, home))
    report.layers += [ExportedLayer(one.name, one.kind, "left alone", reason=one.reason) for one in found.left]
    chosen: list[str] = []
    rewritten = 0
    for layer in found.layers:
        named = replace(layer, name=_path(layer))
        say(f"{named.name}: checking")
        if _place(model, named, found.runs[0], settings, report, timed=timed):
            rewritten += 1
            if home is not None:
                home.keep(model.graph.initializers.values())
                home.rest(model)
            chosen += [value.name for value in named.ids]
    if not rewritten:
        reasons = "; ".join(f"{layer.name}: {layer.reason}" for layer in report.layers[:4]) or "it chooses no experts"
        raise MoecError("MOEC705", f"no layer of {path} can be rewritten: {reasons}")
    say("checking the whole file")
    _check(model, list(dict.fromkeys(chosen)), made, found.runs, settings, report)
    forget_unused(model)
    return Rewritten(model, made, home)


def _rested(model: Any, home: Home | None) -> Callable[[Any], Any]:
    """Sessions, and no more of a large model's weights in memory than they use."""

    def make(part: Any) -> Any:
        if home is not None:
            home.rest(model)
        return session(part)

    return make


def _those_that_run(runtime: Any, made: Sequence[tuple[str, Feed]], given: Path | None) -> list[Made]:
    """The inputs that the file takes; a model may need more tokens than one. Raises MOEC708 where there are none."""
    found, reason = [], ""
    for label, feed in made:
        try:
            found.append(Made(label, feed, runner(runtime, feed)()))
        except Exception as error:  # ONNX Runtime's errors have no common class
            reason = reason or f"({label}) {str(error).strip().splitlines()[0][:200]}"
    if not found:
        names = ", ".join(made[0][1])
        if given is not None:
            raise MoecError("MOEC708", f"the file does not run on the inputs of {given}: {reason}")
        hint = "hand real ones over with --inputs file.npz"
        raise MoecError("MOEC708", f"the file does not run on inputs made up for {names} {reason}", hint=hint)
    return found


def _path(layer: Layer) -> str:
    """The module that the layer came from, where the exporter wrote that down."""
    node = layer.y.producer()
    try:
        scopes = [one for one in ast.literal_eval(node.metadata_props["pkg.torch.onnx.name_scopes"]) if one]
        return str(scopes[-2])
    except (KeyError, ValueError, SyntaxError, IndexError):
        return layer.name


def _place(model: Any, layer: Layer, run: Run, settings: Settings, report: ExportReport, *, timed: bool) -> bool:
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
    facts = facts_about(layer)
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


def _check(
    model: Any,
    chosen: Sequence[str],
    made: Sequence[Made],
    runs: Sequence[Run],
    settings: Settings,
    report: ExportReport,
) -> None:
    """Both files on the same inputs: their outputs, and the experts that their routers choose. Raises MOEC704."""
    runtime = _with_outputs(model, chosen, providers_of(settings.target))
    computed = [output.dtype for node in model.graph for output in node.outputs if output.dtype is not None]
    low = max((LOW_MODEL_BARS.get(dtype.name, 0.0) for dtype in computed), default=0.0)
    check = Check(bar=float("inf") if settings.quantize else max(MODEL_BAR, low), loose=10.0)
    same = total = 0
    for one, run in zip(made, runs, strict=True):
        mine = runner(runtime, one.feed)()
        check.labels.append(one.label)
        for a, b in zip(mine, one.outputs, strict=False):
            check.add(one.label, _tensor(a), _tensor(b))
        for name, a in zip(chosen, mine[len(one.outputs) :], strict=True):
            same, total = same + int((np.sort(a, -1) == np.sort(run[name], -1)).sum()), total + a.size
    report.whole_model_error, report.whole_model_shapes = check.max_error, check.labels
    report.routing_agreement = same / total if total else None
    if settings.quantize is None and total and same < LEAST_AGREEMENT * total:
        raise MoecError("MOEC704", f"the routers make {same / total:.1%} of the original's choices")
    if check.why and not (same < total and "error" in check.why):
        raise MoecError("MOEC704", f"the whole file differs: {check.why}", hint="nothing was written")


def _with_outputs(model: Any, names: Sequence[str], providers: Sequence[Any] = (CPU,)) -> Any:
    """A session that also gives these values; nodes that neither they nor the outputs need are gone."""
    values = {value.name: value for node in model.graph for value in node.outputs}
    outputs = model.graph.outputs
    count = len(outputs)
    outputs.extend(values[name] for name in names)
    try:
        forget_unused(model)
        return session(model, providers=providers)
    finally:
        del outputs[count:]


def _tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def runner(runtime: Any, feed: Mapping[str, Any]) -> Callable[[], Any]:
    """A call of a session on these inputs, of which it may not need all."""
    known = {one.name for one in runtime.get_inputs()}
    needed = {name: array for name, array in feed.items() if name in known}
    return lambda: runtime.run(None, needed)
