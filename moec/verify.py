"""Does the rewrite compute what the original computes? Errors, bars, and the check of one layer over its probes.

Error is ||a - b||_2 / ||b||_2 over the output in fp32, and beside it max|a - b| / max|b|. Both must be within the bar:
2e-6 in fp32 (5e-6 where a reduction is longer than 4,096). In 16 bits the error against an fp32 evaluation may be at
most 1.5 times the original's own: over all probes together, since one probe whose largest token outweighs the others
measures a handful of roundings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from moec.trees import tree_flatten

FP32_BAR = 2e-6
FP32_LONG_BAR = 5e-6
FP64_BAR = 1e-12
LOW_PRECISION_FACTOR = 1.5
# What one probe may add to that, of a 16-bit type's epsilon: about the error of a single rounding.
LOW_PRECISION_SLACK = 0.25
# An original this far from its own fp32 evaluation was not understood, whatever its rounding.
LOW_PRECISION_LIMIT = {torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Difference:
    """How far `mine` is from `theirs`: relative L2, relative maximum, and what is wrong beyond numbers, if anything."""

    l2: float
    largest: float
    mismatch: str = ""
    furthest: str = ""
    """Where the largest difference is, with both values there."""


@dataclass(frozen=True)
class Probe:
    """One input to compare on. `judge` gives the fp32 evaluation of the same input, for 16-bit layers."""

    label: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    judge: Callable[[], torch.Tensor] | None = None


@dataclass
class Verdict:
    """The worst errors over all probes, and the first probe that failed."""

    max_error: float = 0.0
    max_abs_error: float = 0.0
    bar: float = FP32_BAR
    failing: str | None = None
    why: str = ""
    probes: list[str] = field(default_factory=list)
    worst: str | None = None
    """The probe with max_error."""
    rounding: list[tuple[float, float]] = field(default_factory=list)
    """In 16 bits, each probe's error against fp32 and the original's own."""

    @property
    def passed(self) -> bool:
        return self.failing is None and bool(self.probes)


def bar_for(dtype: torch.dtype, longest: int) -> float:
    """The bar on both errors for exact rewrites in `dtype`, whose longest reduction has `longest` terms."""
    if dtype == torch.float64:
        return FP64_BAR
    return FP32_LONG_BAR if longest > 4096 else FP32_BAR


def difference(mine: torch.Tensor, theirs: torch.Tensor) -> Difference:
    """Compare two results; not-a-numbers and infinities must be in the same places."""
    if mine.shape != theirs.shape:
        return Difference(float("inf"), float("inf"), f"shape {tuple(mine.shape)} instead of {tuple(theirs.shape)}")
    if mine.dtype != theirs.dtype:
        return Difference(float("inf"), float("inf"), f"dtype {mine.dtype} instead of {theirs.dtype}")
    if not theirs.is_floating_point():
        same = torch.equal(mine, theirs)
        return Difference(
            0.0 if same else float("inf"), 0.0 if same else float("inf"), "" if same else "other integers"
        )
    wide = torch.float64 if theirs.dtype == torch.float64 else torch.float32
    a, b = mine.detach().to(wide), theirs.detach().to(wide)
    finite = torch.isfinite(b)
    if any(not torch.equal(test(a), test(b)) for test in (torch.isnan, torch.isposinf, torch.isneginf)):
        return Difference(float("inf"), float("inf"), "other values are not finite", _furthest(a, b, _strange(a, b)))
    gap = torch.where(finite, a - b, 0).double()
    size = torch.where(finite, b, 0).double()
    return Difference(_ratio(gap.norm(), size.norm()), _ratio(_peak(gap), _peak(size)), "", _furthest(a, b, gap.abs()))


def _strange(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """One where the values are not finite in the same way."""
    odd = [test(a) != test(b) for test in (torch.isnan, torch.isposinf, torch.isneginf)]
    return (odd[0] | odd[1] | odd[2]).to(a.dtype)


def _furthest(a: torch.Tensor, b: torch.Tensor, gap: torch.Tensor) -> str:
    """The place with the largest gap, and what is there; empty where there is no gap."""
    if not gap.numel() or not float(gap.max()):
        return ""
    flat = int(gap.argmax())
    place = [int(i) for i in torch.unravel_index(torch.tensor(flat), gap.shape)]
    return f"furthest at {place}: {float(a.flatten()[flat]):.6g}, the original has {float(b.flatten()[flat]):.6g}"


def _peak(values: torch.Tensor) -> torch.Tensor:
    return values.abs().max() if values.numel() else values.new_zeros(())


def _ratio(gap: torch.Tensor, size: torch.Tensor) -> float:
    if float(gap) == 0:
        return 0.0
    return float(gap / size) if float(size) > 0 else float("inf")


# How far into objects within objects results are compared.
_DEEPEST = 6


def compare_results(mine: Any, theirs: Any, depth: int = 0) -> Difference:
    """Compare two results of any structure: tensors by value, objects that know no equality by their attributes, such
    as a cache of keys and values, and everything else by equality."""
    flat_mine, spec_mine = tree_flatten(mine)
    flat_theirs, spec_theirs = tree_flatten(theirs)
    if spec_mine != spec_theirs:
        return Difference(float("inf"), float("inf"), "another structure of results")
    worst = Difference(0.0, 0.0)
    for a, b in zip(flat_mine, flat_theirs, strict=True):
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            found = difference(a, b)
        elif depth < _DEEPEST and a is not b and _by_attributes(a, b):
            found = compare_results(vars(a), vars(b), depth + 1)
        elif a is b or a == b:
            found = Difference(0.0, 0.0)
        else:
            found = Difference(float("inf"), float("inf"), f"{a!r} instead of {b!r}")
        if found.mismatch:
            return found
        furthest = found.furthest if found.largest > worst.largest else worst.furthest
        worst = Difference(max(worst.l2, found.l2), max(worst.largest, found.largest), "", furthest)
    return worst


def _by_attributes(a: Any, b: Any) -> bool:
    """Whether two objects are of one class that has attributes and leaves equality to identity."""
    kind: Any = type(a)
    plain = kind is type(b) and getattr(kind, "__eq__", None) is object.__eq__
    return bool(plain and hasattr(a, "__dict__") and not callable(a))


def verify_layer(
    original: Callable[..., Any],
    compiled: Callable[..., Any],
    probes: Iterable[Probe],
    *,
    bar: float,
    low_precision: torch.dtype | None = None,
) -> Verdict:
    """Run both on each probe, up to the first that fails.

    `low_precision` is the layer's 16-bit dtype, judged against fp32 where the probe has a judge. What `compiled` raises
    is a failure; a probe that `original` refuses says nothing.
    """
    verdict = Verdict(bar=bar)
    for probe in probes:
        with torch.no_grad():
            try:
                theirs = original(*probe.args, **probe.kwargs)
            except Exception:  # the user's code refuses this input, so there is nothing to compare
                continue
            try:
                mine = compiled(*probe.args, **probe.kwargs)
            except Exception as error:
                verdict.failing, verdict.why = probe.label, f"{type(error).__name__}: {error}"
                return verdict
        verdict.probes.append(probe.label)
        if low_precision is not None:
            _judge_low_precision(verdict, probe, mine, theirs, low_precision)
        else:
            _judge(verdict, probe, compare_results(mine, theirs))
        if verdict.failing is not None:
            return verdict
    _judge_together(verdict)
    return verdict


def _judge_together(verdict: Verdict) -> None:
    """All probes' rounding in 16 bits, beside the original's."""
    ours, own = (math.hypot(*errors) for errors in zip(*verdict.rounding, strict=True)) if verdict.rounding else (0, 0)
    if ours > LOW_PRECISION_FACTOR * own + 1e-7:
        count = len(verdict.rounding) ** 0.5
        verdict.failing = verdict.worst
        verdict.why = f"error {ours / count:.2e} against fp32 is more than 1.5 times the original's {own / count:.2e}"
        verdict.why += " over all probes"


def _judge(verdict: Verdict, probe: Probe, found: Difference) -> None:
    if verdict.worst is None or found.l2 > verdict.max_error:
        verdict.worst = probe.label
    verdict.max_error = max(verdict.max_error, found.l2)
    verdict.max_abs_error = max(verdict.max_abs_error, found.largest)
    if found.mismatch or not (found.l2 <= verdict.bar and found.largest <= verdict.bar):
        verdict.failing = probe.label
        why = found.mismatch or f"error {found.l2:.2e} (largest {found.largest:.2e}) above {verdict.bar:.0e}"
        verdict.why = f"{why}; {found.furthest}" if found.furthest else why


def _judge_low_precision(verdict: Verdict, probe: Probe, mine: Any, theirs: Any, dtype: torch.dtype) -> None:
    """Both against fp32: the original's own rounding is the measure."""
    limit = LOW_PRECISION_LIMIT[dtype]
    apart = compare_results(mine, theirs)
    if probe.judge is None:
        # Two roundings of one value are apart by at most the sum of their errors.
        verdict.bar = limit
        _judge(verdict, probe, apart)
        return
    if apart.mismatch and "finite" not in apart.mismatch:
        _judge(verdict, probe, apart)
        return
    exact = probe.judge()
    outputs = [_first_tensor(result, exact) for result in (mine, theirs)]
    finite = torch.isfinite(exact) & torch.isfinite(outputs[1].float())
    ours, own = (difference(torch.where(finite, o.float(), 0), torch.where(finite, exact, 0)) for o in outputs)
    if verdict.worst is None or ours.l2 > verdict.max_error:
        verdict.worst = probe.label
    verdict.max_error, verdict.max_abs_error = max(verdict.max_error, ours.l2), max(verdict.max_abs_error, ours.largest)
    verdict.bar = max(verdict.bar if len(verdict.probes) > 1 else 0.0, LOW_PRECISION_FACTOR * own.l2)
    verdict.rounding.append((ours.l2, own.l2))
    # Infinities may differ, by overflow on the way; a not-a-number of the formula itself may not get lost.
    if bool((exact.isnan() & outputs[1].isnan() & ~outputs[0].isnan()).any()):
        verdict.failing, verdict.why = probe.label, "a number where the original has none"
    elif own.l2 > limit:
        verdict.failing, verdict.why = probe.label, f"the original is {own.l2:.1e} from the lifted formula in fp32"
    elif ours.l2 > LOW_PRECISION_FACTOR * own.l2 + LOW_PRECISION_SLACK * torch.finfo(dtype).eps or ours.mismatch:
        verdict.failing = probe.label
        verdict.why = f"error {ours.l2:.2e} against fp32 is more than 1.5 times the original's {own.l2:.2e}"


def _first_tensor(result: Any, like: torch.Tensor) -> torch.Tensor:
    found = next(t for t in tree_flatten(result)[0] if isinstance(t, torch.Tensor) and t.numel() == like.numel())
    return found.reshape(like.shape)
