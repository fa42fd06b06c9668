"""Look at a model and change nothing: each MoE and FFN layer found, with the evidence, or why it is left alone."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from moec.commands.model import add_model_arguments, load, nothing_found
from moec.errors import MoecError, did_you_mean
from moec.report import LayerReport, Report
from moec.table import number

HELP = "what was found in a model, evidence or reason for each candidate"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--why", metavar="NAME", help="everything about one layer: evidence, cut, checks, passes, IR")


def run(arguments: argparse.Namespace) -> int:
    loaded = load(arguments)
    from moec import api

    report = api.explain(loaded.model, loaded.make_inputs(16) if loaded.make_inputs else None)
    if not report.layers:
        raise nothing_found(loaded)
    layers = report.layers if arguments.why is None else _named(report, arguments.why)
    if arguments.json:
        report.layers = layers
        print(report.to_json())
    elif arguments.why is not None:
        print(*map(describe, layers), sep="\n\n")
    else:
        print(loaded.source)
        print(report)
        print("\nmoec inspect MODEL --why NAME tells all about one layer")
    return 0


def _named(report: Report, name: str) -> list[LayerReport]:
    """Every candidate of that name: a module can hold a MoE and a dense FFN beside it."""
    found = [layer for layer in report.layers if layer.name == name]
    if found:
        return found
    names = [layer.name for layer in report.layers]
    hint = did_you_mean(name, names) or "there are: " + ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
    raise MoecError("MOEC608", f"no candidate layer is named {name!r}", hint=hint)


def _summary(probes: Sequence[str]) -> list[str]:
    """The probes, those that differ by their number of tokens alone in one line."""
    counts: dict[str, list[str]] = {}
    for probe in probes:
        count, found, what = probe.partition(" tokens")
        if found and count.isdigit():
            counts.setdefault(what.removeprefix(", ").removeprefix(" "), []).append(count)
        else:
            counts.setdefault(probe, [])
    return [f"{', '.join(dict.fromkeys(n))} tokens {what}" if n else what for what, n in counts.items()]


def describe(layer: LayerReport) -> str:
    """All that the report holds about one layer, in words."""
    parts = [f"{layer.name} ({layer.kind}): {layer.status}"]
    if layer.reason:
        parts.append(f"reason: {layer.reason}")
    if layer.cut:
        parts.append(f"cut: {layer.cut}")
    parts += [f"evidence: {line}" for line in layer.evidence]
    parts += [f"tried: {line}" for line in layer.tried]
    if layer.probes:
        parts.append(f"probes: {len(layer.probes)}: {'; '.join(_summary(layer.probes))}")
    if layer.max_error is not None:
        bar = f", at most {number(layer.bar)} is allowed" if layer.bar is not None else ""
        worst = f", worst on {layer.worst_probe}" if layer.worst_probe else ""
        parts.append(f"error: {number(layer.max_error)} (max abs {number(layer.max_abs_error)}){bar}{worst}")
    if layer.failing_probe:
        parts.append(f"failing probe: {layer.failing_probe}")
    if layer.numerics_error is not None:
        parts.append(f"error of the passes asked for: {number(layer.numerics_error)}")
    for name, done, skipped, _ in layer.pass_logs:
        parts += [f"{name}: {line}" for line in done]
        parts += [f"{name}: left alone: {line}" for line in skipped]
    texts = (("IR", layer.ir_before), ("IR after the passes", layer.ir_after), ("runs", layer.plan))
    for title, text in (*texts, ("IR from the router's logits on, as proved by value", layer.ir_named)):
        if text:
            parts += ["", f"{title}:", text]
    return "\n".join(parts)
