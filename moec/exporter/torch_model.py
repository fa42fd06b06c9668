"""A torch model as a verified ONNX file: layers found, each written and checked alone, the whole exported and checked.

T tokens, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from moec.backends.onnx.providers import providers_of
from moec.compiler import compile_layer
from moec.errors import MoecError
from moec.exporter.calls import why_unmarked
from moec.exporter.dynamic import dynamic_axes
from moec.exporter.insert import Inserted, insert, name_sizes
from moec.exporter.lowerings import place
from moec.exporter.placed import Placed
from moec.exporter.prepare import LOW, prepare
from moec.exporter.result import ExportedLayer, ExportReport
from moec.exporter.rounding import check_lifted
from moec.exporter.settings import Settings
from moec.exporter.traced import layer_key, take_apart, trace
from moec.exporter.whole import Written, check_whole, flat_call, flat_wide
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


def write(
    model: nn.Module,
    example: tuple[tuple[Any, ...], dict[str, Any]],
    settings: Settings,
    report: ExportReport,
    say: Say,
) -> Written:
    """The model as onnx-ir, checked. Raises MOEC701 to 705 and what analysing the model raises."""
    ready = prepare(_as_written(model), (example[0], _without_cache(model, example[1])), settings.target)
    report.notes += ready.notes
    model, (args, kwargs) = ready.model, ready.example
    twin = make_twin(model).eval()
    placed, layers = _place_all(model, (args, kwargs), settings, report, say)
    layout, tensors = take_apart(twin, args, kwargs)
    tensors = _doubled(tensors) if not settings.static else tensors
    flat = flat_call(twin, layout)
    axes = dynamic_axes(flat, tensors) if not settings.static else [frozenset() for _ in tensors]
    say("torch.export")
    found = trace(twin, layers, layout, tensors, axes)
    name_sizes(found)
    inserted = insert(found, placed)
    _report_absent(placed, inserted, report)
    say("checking the whole model")
    shapes = _shapes(found, layout.names, tensors)
    wide = None if ready.wide is None else ready.wide.eval()
    written = Written(found, flat, layout.names, tensors, shapes, flat_wide(wide, layout))
    check_whole(twin, layers, layout, inserted, written, settings, report)
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
    layer.reason = why_unmarked(lifted.call)
    if layer.reason:
        return None
    compiled = compile_layer(lifted, Options.make(backend="reference"), "reference")
    if not compiled.layer.compiled:
        layer.reason = compiled.layer.reason
        return None
    weights = WeightStore(model.get_submodule(lifted.name), lifted.views)
    also = partial(check_lifted, lifted, weights=weights, providers=providers_of(settings.target))
    bar = bar_for(lifted.dtype, lifted.longest)
    one = place(lifted.region, weights, settings, layer, bar, also=also if lifted.dtype in LOW else None)
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


def _doubled(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
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
