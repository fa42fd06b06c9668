"""An ONNX file as a verified ONNX file with its MoE layers rewritten.

T tokens, K experts per token, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moec.backends.onnx.runtime import session
from moec.errors import MoecError
from moec.exporter.beside import Made, runner
from moec.exporter.file_graph import GraphRewriter, Say
from moec.exporter.invent import Feed, feeds
from moec.exporter.result import ExportReport
from moec.exporter.settings import Settings
from moec.exporter.third_matrix import CHECKED_AS, write_out
from moec.frontends.onnx.home import Home
from moec.frontends.onnx.load import load
from moec.frontends.onnx.widen import computes_in_bf16, widen

WIDENED = "the file with bf16 widened to fp32, which is what was written"


@dataclass
class Rewritten:
    """The rewritten model as onnx-ir, and inputs to run it and the file on."""

    model: Any
    made: list[Made]
    home: Home | None = None
    """Where the weights of a large model lie."""
    runs_before: bool = True
    """Whether the file as it is runs here."""


def rewrite(path: Path, settings: Settings, report: ExportReport, say: Say, *, timed: bool = False) -> Rewritten:
    """The file with its layers rewritten, checked. Raises MOEC601, 704, 705, 707 and 708.

    `timed` times each layer alone, and leaves those that would be slower as they are.
    """
    say("reading")
    model, home = load(path)
    written_out = write_out(model, path)
    widened = settings.widen and computes_in_bf16(model)
    if widened:
        widen(model)
        if home is not None:
            home.keep(model.graph.initializers.values())
    runs = not written_out and not widened
    before = _opened(path, path if home is None and runs else model, model)
    made = _those_that_run(before, feeds(model, settings.inputs, few=home is not None), settings.inputs)
    del before
    say("looking for layers")
    rewriter = GraphRewriter(settings, report, say, _rested(model, home), home, timed)
    if not rewriter.rewrite(model, made, "the whole file"):
        reasons = "; ".join(f"{layer.name}: {layer.reason}" for layer in report.layers[:4]) or "it chooses no experts"
        raise MoecError("MOEC705", f"no layer of {path} can be rewritten: {reasons}")
    if widened:
        report.checked_as = WIDENED
    _check_written_out(model, written_out, report)
    whole = rewriter.compared[-1]
    report.whole_model_error, report.whole_model_shapes = whole.check.max_error, whole.check.labels
    same, total = (sum(counts) for counts in zip(*((one.same, one.total) for one in rewriter.compared), strict=True))
    report.routing_agreement = same / total if total else None
    return Rewritten(model, made, home, runs_before=runs)


def _opened(path: Path, source: Any, model: Any) -> Any:
    """A session of a file, or of what it became. Raises MOEC707 where ONNX Runtime does not load it."""
    try:
        return session(source)
    except Exception as error:  # ONNX Runtime's errors have no common class
        reason = str(error).strip().splitlines()[0][:200]
        hint = None
        if computes_in_bf16(model):
            hint = "it computes in bf16, which ONNX Runtime's CPU does not; widen=True (--widen) makes it fp32"
        what = f"{path} cannot be read: ONNX Runtime does not load it: {reason}"
        raise MoecError("MOEC707", what, hint=hint) from error


def _check_written_out(model: Any, products: Sequence[Any], report: ExportReport) -> None:
    """None of what was written out, which computes all experts, may stay. Raises MOEC705 where it does."""
    if not products:
        return
    held = set(model.graph)
    if any(product.producer() in held for product in products):
        reasons = "; ".join(f"{layer.name}: {layer.reason}" for layer in report.layers if layer.reason)
        what = "MoE nodes with a third matrix are rewritten all or none, since they do not run here as they are"
        raise MoecError("MOEC705", f"{what}: {reasons}")
    report.checked_as = "; ".join(one for one in (report.checked_as, CHECKED_AS) if one)


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
