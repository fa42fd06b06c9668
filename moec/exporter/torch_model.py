"""A torch model as a verified ONNX file: layers found, each written and checked alone, the whole exported and checked.

T tokens, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moec.backendbase import load_backend
from moec.backends.onnx.providers import providers_of
from moec.backends.onnx.runtime import session
from moec.compiler import compile_layer
from moec.errors import MoecError
from moec.exporter.calls import Mark
from moec.exporter.check import LEAST_AGREEMENT, Check, agreement, check_model
from moec.exporter.dynamic import dynamic_axes
from moec.exporter.insert import Inserted, insert, name_sizes
from moec.exporter.lowerings import place
from moec.exporter.placed import Placed
from moec.exporter.probes import model_probes
from moec.exporter.result import ExportedLayer, ExportReport
from moec.exporter.settings import Settings
from moec.exporter.traced import Layout, layer_key, marked, results, take_apart, trace
from moec.exporter.ways import optimised
from moec.frontends.onnx.graphs import forget_unused
from moec.frontends.torch.analyse import Analysis, analyse
from moec.frontends.torch.calls import DirectCall
from moec.frontends.torch.effects import Watch
from moec.frontends.torch.install import installed, uninstall
from moec.frontends.torch.lifted import Lifted
from moec.frontends.torch.twin import make_probe, make_twin
from moec.options import Options
from moec.verify import bar_for
from moec.weights import WeightStore

Say = Callable[[str], None]


@dataclass
class Written:
    """A model that was written and checked, and what is needed to time it."""

    model: Any
    original: Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]
    names: tuple[str, ...]
    tensors: list[torch.Tensor]
    shapes: Mapping[str, Sequence[int | str]]


def write(
    model: nn.Module,
    example: tuple[tuple[Any, ...], dict[str, Any]],
    settings: Settings,
    report: ExportReport,
    say: Say,
) -> Written:
    """The model as onnx-ir, checked. Raises MOEC701 to 705 and what analysing the model raises."""
    _check_kind(model)
    model = _as_written(model)
    args, kwargs = example[0], _without_cache(model, example[1])
    twin = make_twin(model).eval()
    placed, layers = _place_all(model, (args, kwargs), settings, report, say)
    layout, tensors = take_apart(twin, args, kwargs)
    tensors = _widened(tensors) if not settings.static else tensors
    flat = _flat_call(twin, layout)
    axes = dynamic_axes(flat, tensors) if not settings.static else [frozenset() for _ in tensors]
    say("torch.export")
    found = trace(twin, layers, layout, tensors, axes)
    name_sizes(found)
    inserted = insert(found, placed)
    _report_absent(placed, inserted, report)
    say("checking the whole model")
    written = Written(found, flat, layout.names, tensors, _shapes(found, layout.names, tensors))
    _check_whole(twin, layers, layout, inserted, written, settings, report)
    forget_unused(found)
    return written


def _place_all(
    model: nn.Module,
    example: tuple[tuple[Any, ...], dict[str, Any]],
    settings: Settings,
    report: ExportReport,
    say: Say,
) -> tuple[dict[str, Placed], list[Lifted]]:
    """Each layer's region by the key of its mark; the report has every candidate."""
    probe = make_probe(model)
    watch = Watch(probe)
    try:
        analysis = analyse(probe, example, say)
        wanted = [lifted for lifted in analysis.lifted if lifted.kind == "moe" or settings.quantize is not None]
        placed, layers = {}, []
        for lifted in wanted:
            say(f"{lifted.name}: checking")
            one = _place(lifted, model, settings, report)
            if one is not None:
                placed[layer_key(lifted)] = one
                _note_assumptions(lifted, report)
                layers.append(lifted)
    finally:
        watch.undo()
    _report_rest(analysis, wanted, report)
    if not placed:
        raise _nothing(report)
    return placed, layers


def _nothing(report: ExportReport) -> MoecError:
    reasons = "; ".join(f"{layer.name}: {layer.reason}" for layer in report.layers[:3])
    return MoecError("MOEC705", f"no layer of {report.source} can be rewritten: {reasons or 'none was found'}")


def _report_absent(placed: Mapping[str, Placed], inserted: Sequence[Inserted], report: ExportReport) -> None:
    """Layers whose method the model does not call. Raises MOEC705 where that is all of them."""
    for key in placed.keys() - {one.key for one in inserted}:
        if (told := placed[key].told) is not None:
            told.reason = "it is never called while the model runs"
    if not inserted:
        raise _nothing(report)


def _place(lifted: Lifted, model: nn.Module, settings: Settings, report: ExportReport) -> Placed | None:
    layer = ExportedLayer(name=lifted.name, kind=lifted.kind, status="left alone", evidence=lifted.evidence)
    report.layers.append(layer)
    compiled = compile_layer(lifted, Options.make(backend="reference"), "reference")
    if not compiled.layer.compiled:
        layer.reason = compiled.layer.reason
        return None
    weights = WeightStore(model.get_submodule(lifted.name), lifted.views)
    one = place(lifted.region, weights, settings, layer, bar_for(lifted.dtype, lifted.longest))
    if one is None:
        where = f"{layer.name}: " + "; ".join(layer.tried)
        raise MoecError("MOEC704", f"no way to write {layer.name} passed its check", where=where)
    return one


def _report_rest(analysis: Analysis, wanted: Sequence[Lifted], report: ExportReport) -> None:
    kept = [lifted for lifted in analysis.lifted if lifted not in wanted]
    why = "a dense FFN is exported as it is written, unless it is quantized"
    report.layers += [ExportedLayer(one.name, one.kind, "left alone", reason=why) for one in kept]
    report.layers += [ExportedLayer(one.name, one.kind, "left alone", reason=one.reason) for one in analysis.refused]
    report.notes += analysis.notes


def _as_written(model: nn.Module) -> nn.Module:
    """A compiled model with its original code: what is exported is found and checked anew."""
    if not installed(model):
        return model
    twin = make_twin(model)
    for method in installed(twin):
        uninstall(method)
    return twin


def _check_kind(model: nn.Module) -> None:
    """MOEC503 for what cannot be checked here: 16 bits, which numpy and ONNX Runtime's CPU hold in part, and GPUs."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype not in (torch.float32, torch.float64):
            what = f"models in {parameter.dtype} are not exported yet: {name}"
            raise MoecError("MOEC503", what, hint="export model.float()")
        if parameter.device.type != "cpu":
            hint = 'export model.to("cpu"); the file has no device'
            raise MoecError(
                "MOEC503", f"exports are checked on the CPU, and {name} is on {parameter.device}", hint=hint
            )


ASSUMED = {
    "dense": "its router gives a weight for every expert; the file takes at most {slots} experts a token",
    "mask": "its router gives one-hot rows; the file takes the first expert of a row",
}


def _note_assumptions(lifted: Lifted, report: ExportReport) -> None:
    """What compiled layers check on each call, and a file cannot."""
    call = lifted.call
    form = call.roles.form if isinstance(call, DirectCall) else getattr(call, "form", None)
    slots = call.roles.slots if isinstance(call, DirectCall) else getattr(call, "num_slots", 1)
    if form in ASSUMED:
        report.notes.append(f"{lifted.name or 'the model'}: {ASSUMED[form].format(slots=slots)}")


def _without_cache(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """transformers models return a cache of keys and values by default, which is no tensor."""
    config = getattr(model, "config", None)
    if getattr(config, "use_cache", None) is not None and hasattr(model, "generate"):
        return {"use_cache": False, **kwargs}
    return kwargs


def _widened(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The example with at least two of its first size: torch.export takes a size of 1 for a fixed one."""
    return [torch.cat([t, t]) if t.dim() > 1 and t.shape[0] == 1 else t for t in tensors]


def _shapes(model: Any, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> dict[str, list[int | str]]:
    """Each input's sizes in the graph: numbers, and names of those that are dynamic."""
    inputs = {value.name: value for value in model.graph.inputs}
    found: dict[str, list[int | str]] = {}
    for name, tensor in zip(names, tensors, strict=True):
        value = inputs.get(name)
        sizes = list(tensor.shape) if value is None else [getattr(size, "value", size) for size in value.shape]
        found[name] = [size if isinstance(size, int | str) else tensor.shape[i] for i, size in enumerate(sizes)]
    return found


def _flat_call(twin: nn.Module, layout: Layout) -> Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]:
    def call(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        args, kwargs = layout.arguments(tensors)
        with torch.no_grad():
            return [tensor for _, tensor in results(twin(*args, **kwargs))]

    return call


def _check_whole(
    twin: nn.Module,
    layers: Sequence[Lifted],
    layout: Layout,
    inserted: Sequence[Inserted],
    written: Written,
    settings: Settings,
    report: ExportReport,
) -> None:
    """The whole file against the model at sizes not traced, and the routers' choices. Raises MOEC704."""
    graph = written.model.graph
    outputs = len(graph.outputs)
    routed = {one.key: one.inputs[1] for one in inserted if len(one.inputs) == 3}
    mixtures = [lifted for lifted in layers if layer_key(lifted) in routed]
    probes = list(model_probes(written.names, written.tensors, written.shapes))
    if settings.static:
        probes = [("the given shape", written.tensors), *probes]
    graph.outputs.extend(dict.fromkeys(value for value in routed.values() if value not in graph.outputs))
    try:
        forget_unused(written.model)
        runtime = session(written.model, providers=providers_of(settings.target))
    finally:
        del graph.outputs[outputs:]
    check, more = check_model(
        written.original, runtime, probes, quantized=settings.quantize is not None, outputs=outputs
    )
    report.whole_model_error, report.whole_model_shapes = check.max_error, check.labels
    if more and mixtures and not check.why.startswith("the original"):
        order = list(dict.fromkeys(routed.values()))
        by_key = {key: order.index(value) for key, value in routed.items()}
        report.routing_agreement = _agreement(twin, mixtures, layout, probes, more, by_key)
    _judge(check, settings, report)


def _judge(check: Check, settings: Settings, report: ExportReport) -> None:
    agreed = report.routing_agreement
    if agreed is not None and agreed < LEAST_AGREEMENT and settings.quantize is None:
        raise MoecError("MOEC704", f"the routers of the file make {agreed:.1%} of the model's choices")
    near_ties = agreed is not None and agreed < 1
    if check.why and not (near_ties and "error" in check.why):
        raise MoecError("MOEC704", f"the whole model differs: {check.why}", hint="nothing was written")
    if check.why:
        report.notes.append(f"{check.why}, where routers met near ties")


def _agreement(
    twin: nn.Module,
    layers: Sequence[Lifted],
    layout: Layout,
    probes: Sequence[tuple[str, list[torch.Tensor]]],
    more: Sequence[tuple[str, list[torch.Tensor]]],
    by_key: Mapping[str, int],
) -> float:
    """The share of choices that both make, over all layers and probes."""
    inputs = dict(probes)
    same = total = 0
    for label, found in more:
        chosen: dict[str, torch.Tensor] = {}
        with marked(twin, layers, _listener(chosen)), torch.no_grad():
            args, kwargs = layout.arguments(inputs[label])
            twin(*args, **kwargs)
        pairs = [(found[by_key[key]], ids) for key, ids in chosen.items()]
        hits, all_of_them = agreement([a for a, _ in pairs], [b for _, b in pairs])
        same, total = same + hits, total + all_of_them
    return same / total if total else 1.0


def _listener(chosen: dict[str, torch.Tensor]) -> Callable[[Lifted], Mark]:
    """Marks that run the region by its meaning, and keep the experts that were chosen."""

    def mark_of(lifted: Lifted) -> Mark:
        run = load_backend("reference").build(optimised(lifted.region), WeightStore(lifted.module, lifted.views), {})

        def mark(x: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
            chosen[layer_key(lifted)] = routing[0].clone()
            return run(x, *routing)[0]

        return mark

    return mark_of
