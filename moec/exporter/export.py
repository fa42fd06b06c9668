"""moec.export: a torch model or an ONNX file becomes an ONNX file that was checked against it."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moec.backends.onnx.bound import run_tensors
from moec.backends.onnx.own_moe import DOMAIN
from moec.backends.onnx.providers import CPU, CUDA, check_installed, fast_providers, providers_of, why_no_cuda
from moec.backends.onnx.runtime import as_array, session
from moec.bench import Effort, compare
from moec.environment import machine, versions
from moec.errors import MoecError
from moec.exporter.apart import run_apart
from moec.exporter.beside import runner
from moec.exporter.file_graph import Say
from moec.exporter.files import check_target, least_runtime, save
from moec.exporter.invent import sized
from moec.exporter.onnx_file import Rewritten, rewrite
from moec.exporter.probes import sampled
from moec.exporter.result import ExportedLayer, ExportReport
from moec.exporter.settings import Settings
from moec.exporter.slower import SLOWER
from moec.exporter.torch_model import write
from moec.exporter.whole import Written
from moec.jsontext import dumps
from moec.progress import show_progress

TIMED_AS_GIVEN = "timed on the given inputs, whatever their number of tokens"


def export(model: Any, path: Any, example_inputs: Any = None, **options: Any) -> ExportReport:
    """Write `model` as an ONNX file whose MoE layers are rewritten, after checking it against the original.

    `model` may also be the path of an .onnx file, whose inputs are made up. `example_inputs` is a tuple of positional
    or a dict of keyword arguments; sizes at which the model still runs when they change are dynamic in the file.
    Options are the fields of `Settings`. Nothing is written unless every check passes.

    Raises MOEC501 and MOEC502 for options, MOEC607 and MOEC706 for the path, MOEC209, 211, 213 and 701 to 703 for the
    model and its inputs, MOEC704 where a check fails, MOEC705 where there is nothing to rewrite.
    """
    check_installed()
    settings = Settings.make(path, **options)
    if isinstance(model, str | Path):
        return _export_file(Path(model), settings)
    check_target(settings.path, None)
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise MoecError("MOEC209", f"moec exports an nn.Module, not {what}", hint="pass an instance of torch.nn.Module")
    report = ExportReport(
        source=type(model).__name__, path=settings.path, target=settings.target, quantize=settings.quantize
    )
    report.notes += _target_notes(settings)
    start = time.perf_counter()
    with show_progress("export") as say:
        written = write(model, _example(example_inputs), settings, report, say)
        say("writing")
        finish(written, settings, report)
    report.seconds = time.perf_counter() - start
    return report


def _export_file(source: Path, settings: Settings) -> ExportReport:
    """An .onnx file, rewritten. A form that is slower at a named number of tokens is not written (MOEC705)."""
    if source.suffix != ".onnx":
        hint = "pass the module itself, or the path of an .onnx file"
        raise MoecError("MOEC209", f"moec exports an nn.Module or an .onnx file, not {source}", hint=hint)
    check_target(settings.path, source)
    report = ExportReport(str(source), settings.path, settings.target, settings.quantize)
    report.notes += _target_notes(settings)
    start = time.perf_counter()
    with show_progress("export") as say:
        made = rewrite(source, settings, report, say)
        if _time_both(source, made, settings, report, say):
            # Some layers may gain what others lose: each is timed alone, and those that lose stay.
            report.layers.clear()
            made = rewrite(source, settings, report, say, timed=True)
            slower = _time_both(source, made, settings, report, say)
            if slower:
                raise MoecError(
                    "MOEC705", f"the rewritten file would be slower: {slower}", hint="the file stays as it is"
                )
        say("writing")
        report.opset = made.model.opset_imports[""]
        report.least_onnxruntime = least_runtime(report.opset, contrib=_contrib(made.model))
        report.file_bytes = save(
            made.model,
            settings.path,
            _properties(report),
            external=settings.external_data,
            home=made.home,
            notes=report.notes,
        )
        if made.home is None:
            _load(settings.path, lambda one: runner(one, made.made[0].feed), report)
        else:
            _load_apart(settings.path, made.made[0].feed, report)
    report.versions, report.machine = versions(), machine()
    report.seconds = time.perf_counter() - start
    return report


def _time_both(source: Path, made: Rewritten, settings: Settings, report: ExportReport, say: Say) -> str:
    """Latencies of both files in turns; in words where the rewritten one is slower, empty if it is nowhere."""
    report.latency.clear()
    if not settings.tokens:
        return ""
    if not made.runs_before:
        report.notes.append("not timed: the file as it was does not run here")
        return ""
    if settings.inputs is not None and TIMED_AS_GIVEN not in report.notes:
        report.notes.append(TIMED_AS_GIVEN)
    say("timing")
    where, threads = fast_providers(settings.target), torch.get_num_threads()
    after = session(made.model, threads=threads, spinning=True, providers=where)
    before = session(source, threads=threads, spinning=True, providers=where)
    for count in settings.tokens:
        feed = sized(made.model, count) if settings.inputs is None else made.made[0].feed
        pair = compare(runner(before, feed), runner(after, feed), Effort(seconds=settings.seconds))
        report.latency.append({"tokens": count, "before_ms": pair[0].median_ms, "after_ms": pair[1].median_ms})
    for row in report.latency:
        if row["after_ms"] > SLOWER * row["before_ms"]:
            return f"{row['after_ms']:.3g} ms instead of {row['before_ms']:.3g} at {row['tokens']} tokens"
    return ""


def _example(given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if given is None:
        hint = "pass a tuple of positional or a dict of keyword arguments of the model's forward"
        raise MoecError("MOEC703", "a torch model is exported by running it on example_inputs", hint=hint)
    if isinstance(given, Mapping):
        return (), dict(given)
    if isinstance(given, tuple):
        return given, {}
    hint = "pass a tuple of positional or a dict of keyword arguments"
    raise MoecError("MOEC213", f"example_inputs is a {type(given).__name__}", hint=hint)


def _target_notes(settings: Settings) -> list[str]:
    """What a file for this target was checked on, where that is not the target."""
    why = why_no_cuda() if settings.target == "cuda" else ""
    return [f"checked and timed on the CPU: {why}"] if why else []


def finish(written: Written, settings: Settings, report: ExportReport) -> None:
    """Write the file, then load and time it."""
    report.opset = written.model.opset_imports[""]
    report.least_onnxruntime = least_runtime(report.opset, contrib=_contrib(written.model))
    check = partial(_check_static, written, settings, report) if settings.static else None
    report.file_bytes = save(
        written.model, settings.path, _properties(report), external=settings.external_data, check=check
    )
    if written.runs_on(providers_of(settings.target)):
        runtime = _load(settings.path, lambda one: _caller(one, written, written.tensors), report)
        _time(runtime, written, settings, report)
    report.versions, report.machine = versions(), machine()


def _check_static(written: Written, settings: Settings, report: ExportReport, path: Path) -> None:
    """Every size of inputs and outputs is a number, and a process with nothing but ONNX Runtime runs it (MOEC704)."""
    for value in (*written.model.graph.inputs, *written.model.graph.outputs):
        if value.shape is None or not all(isinstance(size, int) for size in value.shape):
            raise MoecError("MOEC704", f"the sizes of {value.name} are not fixed: {value.shape}")
    if not written.runs_on((CPU,)):
        return
    try:
        report.peak_bytes = run_apart(path, _feed(written, written.tensors)).peak_bytes
    except RuntimeError as error:
        raise MoecError("MOEC704", str(error), hint="nothing was written") from error


def _load_apart(path: Path, feed: Mapping[str, Any], report: ExportReport) -> None:
    """Enter what loading a large file takes; where it fails, say so."""
    try:
        found = run_apart(path, feed)
    except RuntimeError as error:
        report.notes.append(f"the file was not loaded apart: {error}")
        return
    report.load_seconds, report.memory_bytes = found.load_seconds, found.peak_bytes


def _contrib(model: Any) -> bool:
    """Whether the file has ops that only ONNX Runtime has."""
    return any(node.domain == DOMAIN for node in model.graph.all_nodes())


def _properties(report: ExportReport) -> dict[str, str]:
    """What the file says about itself."""
    error = "not compared" if report.whole_model_error is None else f"{report.whole_model_error:.1e}"
    layers = [{"name": one.name, "written as": one.lowering, "error": one.max_error} for one in report.rewritten]
    plan = [
        {"layer": one.name, "written as": one.lowering or "as it was", "because": _because(one)}
        for one in report.layers
    ]
    return {
        "moec.version": versions().get("moec", "a checkout"),
        "moec.target": report.target,
        "moec.quantize": report.quantize or "none",
        "moec.least_onnxruntime": report.least_onnxruntime,
        "moec.execution_provider": CUDA if report.target == "cuda" and not why_no_cuda() else CPU,
        "moec.verification": f"error {error} at {', '.join(report.whole_model_shapes)}{_compared(report)}",
        "moec.layers": dumps(layers),
        "moec.plan": dumps(plan),
    }


def _because(layer: ExportedLayer) -> list[str]:
    """Why a layer is written as it is: what was left alone, what was chosen between, what did not serve."""
    return [told for told in (layer.reason, layer.choice, *layer.tried) if told]


def _compared(report: ExportReport) -> str:
    """With what a file in 16 bits was compared, and what stood in its place."""
    own = report.original_error
    told = "" if own is None else f", against fp32, from which the model itself is {own:.1e}"
    return f"{told}; checked as {report.checked_as}" if report.checked_as else told


def _load(path: Path, caller: Callable[[Any], Callable[[], Any]], report: ExportReport) -> Any:
    """How long loading takes and how much memory a run needs; the session."""
    before = _resident()
    start = time.perf_counter()
    providers = fast_providers(report.target)
    runtime = session(path, threads=torch.get_num_threads(), spinning=True, providers=providers)
    report.load_seconds = time.perf_counter() - start
    caller(runtime)()
    report.memory_bytes = max(0, _resident() - before)
    return runtime


def _time(runtime: Any, written: Written, settings: Settings, report: ExportReport) -> None:
    """Latencies in turns where token counts are named."""
    for count in settings.tokens:
        tensors = _sized(written, count)
        if tensors is None:
            report.notes.append(f"not timed at {count} tokens: the sizes of the inputs are fixed")
            continue
        effort = Effort(seconds=settings.seconds)
        after = _caller(runtime, written, tensors)
        pair = compare(lambda: written.original(tensors), after, effort)  # noqa: B023
        report.latency.append({"tokens": count, "before_ms": pair[0].median_ms, "after_ms": pair[1].median_ms})


def _caller(runtime: Any, written: Written, tensors: Sequence[torch.Tensor]) -> Callable[[], Any]:
    """A call of a session; numpy has no bf16, so where that goes in or comes out tensors are handed over."""
    told = [*runtime.get_inputs(), *runtime.get_outputs()]
    if not any("bfloat16" in one.type for one in told):
        return runner(runtime, _feed(written, tensors))
    known = {one.name for one in runtime.get_inputs()}
    given = {name: tensor for name, tensor in zip(written.names, tensors, strict=True) if name in known}
    return lambda: run_tensors(runtime, given)


def _feed(written: Written, tensors: Sequence[torch.Tensor]) -> dict[str, Any]:
    return {name: as_array(tensor) for name, tensor in zip(written.names, tensors, strict=True)}


def _sized(written: Written, count: int) -> list[torch.Tensor] | None:
    """The example with this many tokens: 1 for the first dynamic size, `count` for all others."""
    letters = list(dict.fromkeys(s for name in written.names for s in written.shapes[name] if isinstance(s, str)))
    if not letters:
        return None
    sizes = {letter: 1 if i == 0 and len(letters) > 1 else count for i, letter in enumerate(letters)}
    return [
        sampled(tensor, [sizes[s] if isinstance(s, str) else s for s in written.shapes[name]])
        for name, tensor in zip(written.names, written.tensors, strict=True)
    ]


def _resident() -> int:
    """Bytes of memory that this process holds now; its peak where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
