"""The line from a lifted layer to an installed one: build, verify, pass by pass, verify again, install, report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn

from moec.backendbase import Executable, Tunes, load_backend, why_not
from moec.errors import MoecError
from moec.frontends.torch.gradients import graphed_with_gradients, recording_of
from moec.frontends.torch.graphed import Graphed, graphed
from moec.frontends.torch.layer_op import forget
from moec.frontends.torch.lifted import Lifted
from moec.frontends.torch.method import CompiledMethod, Recording
from moec.frontends.torch.training import differs_in_training
from moec.ir import Region
from moec.options import Options
from moec.passbase import Pass, PassLog
from moec.pipeline import default_passes, run
from moec.report import LayerReport
from moec.verify import FP32_BAR, Probe, Verdict, bar_for, compare_results, verify_layer
from moec.weights import WeightStore

# Two sizes of ordinary tokens.
_GRAPH_PROBES = 2
_LOW = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Compiled:
    """A verified layer, ready to be installed on any twin of the module it was found in."""

    lifted: Lifted
    layer: LayerReport
    region: Region
    backend: str
    pack: bool
    graphs: bool
    strict: bool
    training: bool = False
    graphed: Graphed | None = None
    recording: Recording | None = None
    """How to build what computes gradients; None where the original is run again for them."""

    def method_for(self, model: nn.Module, kind: type[CompiledMethod] = CompiledMethod) -> CompiledMethod:
        """The method that stands in the model's own module of the same name."""
        # The method outlives the compilation: it must not hold on to the module that the probes ran on.
        views, region, backend = self.lifted.views, self.region, self.backend
        pack, graphs = self.pack, self.graphs
        return kind(
            module=model.get_submodule(self.lifted.name),
            method=self.lifted.method,
            call=self.lifted.call,
            store=lambda module: WeightStore(module, views),
            build=lambda weights: load_backend(backend).build(region, weights, {}, pack=pack, graphs=graphs),
            layer=self.layer,
            replaced=self.lifted.replaced,
            strict=self.strict,
            training=self.training,
            graphed=self.graphed,
            recording=self.recording,
        )


def choose_backend(options: Options, device: torch.device) -> tuple[str, str]:
    """Name of the back end for layers on a device, and why where the user did not say. Raises MOEC408."""
    if options.backend != "auto":
        why = why_not(options.backend, device)
        if why:
            hint = 'backend="auto" takes one that can'
            raise MoecError("MOEC408", f"back end {options.backend} cannot run: {why}", hint=hint)
        return options.backend, ""
    if device.type != "cuda":
        return "reference", f"back end reference: the layers are on {device.type}"
    why = why_not("triton", device)
    return (
        ("reference", f"back end reference: {why}") if why else ("triton", "back end triton: the layers are on a GPU")
    )


def compile_layer(lifted: Lifted, options: Options, backend: str, *, for_graph: bool = False) -> Compiled:
    """Passes, build and verification of one layer; the report says what happened, also when it is left alone.

    `for_graph`: it will stand in a graph alone, so nothing is made ready for calls outside of graphs.
    """
    layer = LayerReport(
        name=lifted.name,
        kind=lifted.kind,
        status="compiled",
        cut=lifted.cut,
        evidence=lifted.evidence,
        ir_before=str(lifted.region),
        ir_named=str(lifted.named) if lifted.named is not None else "",
    )
    result = Compiled(lifted, layer, lifted.region, backend, options.pack, options.graphs, options.strict)
    passes = default_passes(options)
    exact, changing = _split(passes)
    region, logs = run(lifted.region, exact)
    executable = _build(lifted, region, backend, options)
    if options.tunes and isinstance(executable, Tunes):
        executable.tune()  # before verification, which then runs the very kernels that will serve
    if options.verify:
        verdict = _verify(lifted, executable)
        _record(layer, verdict)
        mattering = _grad_mode_matters(lifted) if verdict.passed else ""
        if mattering:
            layer.status, layer.reason = "left alone", mattering
            return result
        if not verdict.passed:
            layer.status, layer.reason = (
                "left alone",
                f"verification failed at {verdict.failing}: {verdict.why}" if verdict.failing else "no probe ran",
            )
            return result
    training = options.training and _serves_training(lifted, layer)
    if changing:
        region, more = run(lifted.region, passes)
        logs = more
        executable = _build(lifted, region, backend, options)
        if options.tunes and isinstance(executable, Tunes):
            executable.tune()
        layer.numerics_error = _numerics_error(lifted, executable)
    recording = recording_of(lifted, layer, region, backend) if options.training and not for_graph else None
    _describe(layer, region, logs, executable, backend, lifted)
    found = _graphed(lifted, region, backend, executable, options)
    if isinstance(found, str):
        layer.evidence = (*layer.evidence, f"left out of graphs of torch.compile and torch.export: {found}")
    traced = found if isinstance(found, Graphed) else None
    if traced is not None and options.training:
        traced = graphed_with_gradients(lifted, layer, traced)
    return Compiled(
        lifted,
        layer,
        region,
        backend,
        options.pack,
        options.graphs,
        options.strict,
        training,
        traced,
        recording,
    )


def _graphed(lifted: Lifted, region: Region, backend: str, executable: Executable, options: Options) -> Graphed | str:
    """The layer as it stands in graphs, checked to give what the executable gives; or why it does not."""
    found = graphed(lifted.name, lifted.call, region, backend, options.pack, WeightStore(lifted.module, lifted.views))
    if found is None:
        return "its cut has no form there"
    try:
        for probe in islice(lifted.probes(), _GRAPH_PROBES if options.verify else 0):
            why = _differs_in_graphs(lifted, found, executable, probe)
            if why:
                return why
    finally:
        forget(found.params(lifted.module))
    return found


def _differs_in_graphs(lifted: Lifted, found: Graphed, executable: Executable, probe: Probe) -> str:
    """How the layer as it stands in graphs differs from the executable at the probe; empty if it does not."""
    try:
        with torch.no_grad():
            theirs = lifted.call(lifted.module, executable, probe.args, probe.kwargs)
            mine = found.run(lifted.module, "", probe.args, probe.kwargs)
    except Exception as error:  # operations of the user's, in another order
        return f"{type(error).__name__}: {error}"
    gap = compare_results(mine, theirs)
    if gap.mismatch or gap.l2 > bar_for(lifted.dtype, lifted.longest):
        return f"it differs at {probe.label}: {gap.mismatch or f'error {gap.l2:.1e}'}"
    return ""


def _serves_training(lifted: Lifted, layer: LayerReport) -> bool:
    """Whether training mode is the same function; the report says so, or why not."""
    why = differs_in_training(lifted)
    said = f"{why}: there the original code runs" if why else "the same function in training mode, which it serves too"
    layer.evidence = (*layer.evidence, said)
    return not why


def _split(passes: Sequence[Pass]) -> tuple[tuple[Pass, ...], tuple[Pass, ...]]:
    return tuple(p for p in passes if not p.changes_numerics), tuple(p for p in passes if p.changes_numerics)


def _build(lifted: Lifted, region: Region, backend: str, options: Options) -> Executable:
    store = WeightStore(lifted.module, lifted.views)
    return load_backend(backend).build(region, store, {}, pack=options.pack, graphs=options.graphs)


def _verify(lifted: Lifted, executable: Executable) -> Verdict:
    low = lifted.dtype if lifted.dtype in _LOW else None
    return verify_layer(
        lifted.original,
        lambda *args, **kwargs: lifted.call(lifted.module, executable, args, kwargs),
        lifted.probes(),
        bar=bar_for(lifted.dtype, lifted.longest),
        low_precision=low,
    )


def _grad_mode_matters(lifted: Lifted) -> str:
    """Why a layer may differ where gradients are recorded, empty if it does not.

    Code may ask torch.is_grad_enabled(); what was observed holds without gradients only.
    """
    probe = next(lifted.probes())
    try:
        with torch.no_grad():
            without = lifted.original(*probe.args, **probe.kwargs)
        with torch.enable_grad():
            recorded = lifted.original(*probe.args, **probe.kwargs)
    except Exception as error:  # what the user's code raises in one of the modes, it raises compiled or not
        return f"its code refuses {probe.label}, with which it is verified: {type(error).__name__}: {error}"
    found = compare_results(recorded, without)
    differs = bool(found.mismatch) or found.l2 > FP32_BAR
    return "its result depends on whether gradients are being recorded" if differs else ""


def _record(layer: LayerReport, verdict: Verdict) -> None:
    layer.max_error, layer.max_abs_error, layer.bar = verdict.max_error, verdict.max_abs_error, verdict.bar
    layer.probes, layer.worst_probe, layer.failing_probe = tuple(verdict.probes), verdict.worst, verdict.failing


def _numerics_error(lifted: Lifted, executable: Executable) -> float:
    """Worst relative L2 against the original over the probes with finite inputs at ordinary scales."""
    worst = 0.0
    for probe in lifted.probes():
        if not _ordinary(probe):
            continue
        with torch.no_grad():
            theirs = lifted.original(*probe.args, **probe.kwargs)
            mine = lifted.call(lifted.module, executable, probe.args, probe.kwargs)
        worst = max(worst, compare_results(mine, theirs).l2)
    return worst


def _ordinary(probe: Probe) -> bool:
    return "not-a-number" not in probe.label


def _describe(
    layer: LayerReport, region: Region, logs: Sequence[PassLog], executable: Executable, backend: str, lifted: Lifted
) -> None:
    layer.backend = backend
    layer.passes = tuple(log.name for log in logs)
    layer.pass_logs = tuple((log.name, tuple(log.done), tuple(log.skipped), log.diff) for log in logs)
    layer.ir_after = str(region)
    layer.plan = executable.describe()
    owned = WeightStore(lifted.module, lifted.views).nbytes
    layer.bytes_before = owned
    layer.bytes_after = owned + executable.nbytes_packed
    layer.bytes_peak = layer.bytes_after
