"""Which ways there are to write a layer for a target, best first, and the first of them that passes its check."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moec.backendbase import Weights
from moec.backends.onnx.form import EXACT, INTEGER, Form
from moec.exporter.check import check_region
from moec.exporter.insert import Placed
from moec.exporter.probes import num_experts
from moec.exporter.result import ExportedLayer
from moec.exporter.settings import Settings
from moec.ir import Region
from moec.options import Options
from moec.pipeline import default_passes, run


@dataclass(frozen=True)
class Way:
    """One way to write a layer."""

    title: str
    region: Region
    form: Form


def ways(exact: Region, settings: Settings) -> Iterator[Way]:
    """What there is for these settings, best first. `exact` is the region after the passes that keep results."""
    each = "sorted rows, a product for each expert" if num_experts(exact) > 1 else "a product for each matrix"
    if settings.quantize == "int8":
        quantized, _ = run(exact, default_passes(Options.make(quantize="int8")))
        yield Way(f"{each}, int8 weights and rows", quantized, INTEGER)
        yield Way(f"{each}, int8 weights widened before it", quantized, EXACT)
        return
    yield Way(each, exact, EXACT)


def optimised(region: Region) -> Region:
    """The region after the passes that keep results within the bar."""
    return run(region, default_passes(Options.make()))[0]


def place(region: Region, weights: Weights, settings: Settings, layer: ExportedLayer, bar: float) -> Placed | None:
    """The first way that passes its check, reported in `layer`; None where none does."""
    exact = optimised(region)
    for way in ways(exact, settings):
        check = check_region(exact, way.region, weights, way.form, bar)
        if check.passed:
            layer.status, layer.lowering = "rewritten", way.title
            layer.max_error, layer.max_abs_error, layer.bar = check.max_error, check.max_abs_error, check.bar
            return Placed(layer.name, way.region, weights, way.form)
        layer.tried.append(f"{way.title}: {check.why}")
    layer.status, layer.reason = "left alone", "no way to write it passed its check"
    return None
