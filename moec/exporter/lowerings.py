"""The fastest way to write a layer that passes its check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from moec.backendbase import Weights
from moec.backends.onnx.providers import providers_of
from moec.exporter.check import Check, check_region
from moec.exporter.choose import fastest_first
from moec.exporter.placed import Placed
from moec.exporter.result import ExportedLayer
from moec.exporter.settings import Settings
from moec.exporter.ways import Way, optimised, ways
from moec.ir import Region


def place(
    region: Region,
    weights: Weights,
    settings: Settings,
    layer: ExportedLayer,
    bar: float,
    *,
    also: Callable[[Way], Check] | None = None,
) -> Placed | None:
    """The first way that passes its check, and what to write instead where it rests on more; None where none passes.

    `also` checks ways that keep the weights as they are once more, and its errors are reported.
    """
    exact = optimised(region)
    best: Placed | None = None
    for way in _ordered(exact, weights, settings, layer):
        own = way.form.experts != "sorted"
        if own and best is not None:
            continue
        if way.why_not:
            layer.tried.append(f"{way.title}: {way.why_not}")
            continue
        check = check_region(exact, way.region, weights, way.form, bar, providers_of(settings.target))
        if check.passed and also is not None and way.region == exact and not way.form.rounds_weights:
            check = also(way)
        if not check.passed:
            layer.tried.append(f"{way.title}: {check.why}")
            continue
        one = Placed(layer.name, way.region, weights, way.form, way.title, layer, check)
        if not own:
            return one if best is None else replace(best, instead=one)
        best = one
    if best is None:
        layer.status, layer.reason = "left alone", "no way to write it passed its check"
    return best


def _ordered(exact: Region, weights: Weights, settings: Settings, layer: ExportedLayer) -> list[Way]:
    """All ways, rivals by speed in the place of the first of them; the report says how that is known."""
    every = list(ways(exact, settings))
    rivals = [way for way in every if way.rival]
    order, layer.choice = fastest_first(rivals, weights, settings.tokens, tune=settings.tune) if rivals else ([], "")
    first = every.index(rivals[0]) if rivals else 0
    rest = [way for way in every if not way.rival]
    return [*rest[:first], *order, *rest[first:]]
