"""The demo's pages: what each finding looks like on a screen."""

from __future__ import annotations

from moec.demo.findings import Accuracy, Batch, Findings, Variant
from moec.demo.screen import Screen, shades
from moec.report import LayerReport
from moec.table import number, size


def model(screen: Screen, found: Findings) -> None:
    screen.title("moec demo")
    screen.say(found.machine)
    screen.say(f"torch {found.versions.get('torch', '?')} on {found.where}")
    screen.say(f"{found.model}; {found.parameters:,} parameters")


def digit(screen: Screen, image: list[list[float]], label: int, layer: str, experts: list[list[int]]) -> None:
    """One held-out image[8, 8] in 0..1, and beside it the experts[16, K] that its patches of 2x2 pixels go to."""
    shade = shades()
    screen.title(f"A held-out {label}, and the experts its 16 patches go to in {layer}")
    drawn = ["".join(shade[min(int(level * 5), 4)] * 2 for level in row) for row in image]
    for index, line in enumerate(drawn):
        row = experts[index // 2 * 4 :][:4] if index % 2 == 0 else []
        cells = "".join(f"{'+'.join(map(str, sorted(patch))):>8}" for patch in row)
        screen.code(f"{line}{cells}".rstrip())


def compilation(screen: Screen, variant: Variant) -> None:
    """What was found and how far each compiled layer is from the original."""
    report = variant.report
    screen.title(variant.call)
    screen.say(f"{len(report.compiled)} of {len(report.layers)} layers compiled and checked in {report.seconds:.1f} s")
    headers = ["layer", "kind", "status", "back end", "error", "at most", "max abs"]
    screen.rows(headers, [_check(layer) for layer in report.layers], right=headers[-3:])
    first = variant.first_moe
    if first is not None and first.evidence:
        screen.say(f"why {first.name} is a MoE layer:")
        for line in first.evidence:
            screen.say(f"  {line}")
    for layer in report.layers:
        if not layer.compiled:
            screen.bad(f"{layer.name} was left alone: {layer.reason}")
            if layer.failing_probe:
                screen.say(f"  failing probe: {layer.failing_probe}")
        elif layer.numerics_error is not None:
            screen.say(f"{layer.name}: what was asked for changes its output by {number(layer.numerics_error)}")
    before, after = (sum(sizes) for sizes in zip(*map(_bytes, report.compiled), strict=True)) if first else (0, 0)
    if after != before:
        screen.say(f"expert weights: {size(before)} before, {size(after)} after")
    for note in report.notes:
        screen.say(f"note: {note}")


def program(screen: Screen, layer: LayerReport, *, lifted: bool) -> None:
    """One layer's IR as it was lifted (if asked for), what each pass did, the IR after, and what runs."""
    if lifted:
        screen.title(f"IR of {layer.name}, as it was lifted")
        screen.code(layer.ir_before)
    screen.title("Passes")
    for name, done, skipped, difference in layer.pass_logs:
        lines = [*done, *(f"left alone: {line}" for line in skipped)]
        screen.good(f"{name}: {lines[0] if lines else 'nothing to do'}")
        for line in lines[1:]:
            screen.say(f"  {line}")
        if difference:
            screen.diff(difference)
    screen.title(f"IR of {layer.name}, after the passes")
    screen.code(layer.ir_after)
    if layer.plan:
        screen.say("runs as:")
        screen.code(layer.plan)


def accuracy(screen: Screen, found: Accuracy, *, exact: bool) -> None:
    """exact: predictions must not change, so a change is bad news."""
    screen.title(f"Accuracy on {found.images} digits that training never saw")
    rows = [
        [name, str(right), f"{100 * right / found.images:.2f} %"]
        for name, right in (("before", found.right_before), ("after", found.right_after))
    ]
    screen.rows(["model", "right", "accuracy"], rows, right=["right", "accuracy"])
    logits = f"the logits differ by {number(found.logit_error)}" if found.logit_error else "the logits are equal"
    if not found.changed:
        screen.good(f"the same prediction for every image; {logits}")
    else:
        tell = screen.bad if exact else screen.say
        tell(f"{found.changed} of {found.images} predictions changed; {logits}")


def latency(screen: Screen, batches: list[Batch], where: str) -> None:
    screen.title("Latency of the whole model")
    headers = ["images", "tokens", "before ms", "after ms", "faster"]
    rows = [
        [str(batch.images), str(batch.tokens), str(batch.before), str(batch.after), f"{batch.speedup:.2f}x"]
        for batch in batches
    ]
    screen.rows(headers, rows, right=headers)
    screen.say(f"medians of interleaved runs, [10th..90th percentile]; {where}")


def verdict(screen: Screen, found: Findings) -> None:
    screen.say("")
    for problem in found.problems():
        screen.bad(f"FAILED: {problem}")
    if not found.problems():
        screen.good(f"Every layer verified, every prediction accounted for, in {found.seconds:.0f} s.")
        screen.say("Your own model: moec.compile(model), or moec inspect module.py:factory")


def _bytes(layer: LayerReport) -> tuple[int, int]:
    return layer.bytes_before or 0, layer.bytes_after or layer.bytes_before or 0


def _check(layer: LayerReport) -> list[str]:
    error, bar, largest = (number(value) for value in (layer.max_error, layer.bar, layer.max_abs_error))
    return [layer.name, layer.kind, layer.status, layer.backend or "-", error, bar, largest]
