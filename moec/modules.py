"""All layers of one nn.Module: found and compiled on a probe of it, put in order, and run as a whole."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from moec.compiler import Compiled, choose_backend
from moec.environment import machine, versions
from moec.errors import MoecError
from moec.freeing import compile_freed, refuse_freeing
from moec.frontends.torch.analyse import Analysis, analyse, candidates
from moec.frontends.torch.effects import Watch
from moec.frontends.torch.install import install, uninstall
from moec.frontends.torch.twin import borrowed, make_probe
from moec.options import Options
from moec.progress import progress
from moec.report import LayerReport, Report
from moec.verify import compare_results


@contextmanager
def probe_of(target: nn.Module, options: Options) -> Iterator[nn.Module]:
    """A model to run probes on; its effects are undone, whatever happens."""
    if options.inplace:
        try:
            probe = make_probe(target)
        except Exception:  # a model that cannot be copied is its own probe
            with borrowed(target) as itself:
                watch = Watch(itself)
                try:
                    yield itself
                finally:
                    watch.undo()
            return
    else:
        probe = make_probe(target)
    watch = Watch(probe)
    try:
        yield probe
    finally:
        watch.undo()


def compile_modules(
    probe: nn.Module, example: tuple[tuple[Any, ...], dict[str, Any]] | None, options: Options
) -> tuple[Report, list[Compiled]]:
    """Analyse and compile every layer of the probe."""
    backend, why = choose_backend(options, _device(probe))
    refuse_freeing(options, backend)
    report = Report(versions=versions(), machine=machine(), notes=[why] if why else [])
    # A library call says nothing to a log file; on a terminal the wait is shown.
    with progress("compiling", 2 * len(candidates(probe)), quiet=not sys.stderr.isatty()) as bar:
        found = analyse(probe, example, bar.step)
        layers = []
        for lifted in found.lifted:
            bar.step(lifted.name)
            layers.append(compile_freed(probe, lifted, options, backend))
    report.notes += found.notes
    report.layers = _ordered(probe, [c.layer for c in layers], found)
    if options.strict:
        _check_strict(report)
    if example is not None and options.verify:
        report.whole_model_error = _whole_model_error(probe, example, found, layers)
        if report.whole_model_error is None:
            for layer in report.compiled:
                layer.status, layer.reason = "left alone", "the compiled model raised on example_inputs"
        if options.strict:
            _check_strict(report)
    return report, layers


def _device(model: nn.Module) -> torch.device:
    """Where the model's first parameter is."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _ordered(model: nn.Module, layers: Sequence[LayerReport], found: Analysis) -> list[LayerReport]:
    """All layers in the order of the model's modules."""
    every = [
        *layers,
        *(
            LayerReport(name=r.name, kind=r.kind, status="left alone", reason=r.reason, tried=r.tried)
            for r in found.refused
        ),
    ]
    position = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return sorted(every, key=lambda layer: position.get(layer.name, len(position)))


def _check_strict(report: Report) -> None:
    for layer in report.layers:
        if not layer.compiled:
            failed = layer.failing_probe is not None
            raise MoecError(
                "MOEC221" if failed else "MOEC220",
                f"{layer.name or 'the model'} was left alone: {layer.reason}",
                hint="without strict=True the other layers are compiled",
            )


def _whole_model_error(
    probe: nn.Module, example: tuple[tuple[Any, ...], dict[str, Any]], found: Analysis, layers: Sequence[Compiled]
) -> float | None:
    """Relative L2 of the compiled model's result against the original's on example_inputs; None if it raised."""
    methods = [layer.method_for(probe) for layer in layers if layer.layer.compiled]
    try:
        for method in methods:
            install(method)
        with torch.no_grad():
            result = probe(*example[0], **example[1])
    except Exception:  # the original ran on these inputs, so whatever this is, it is not for the user
        return None
    finally:
        for method in methods:
            uninstall(method)
            method.layer.fallbacks, method.layer.fallback_reasons = 0, {}
    return compare_results(result, found.result).l2
