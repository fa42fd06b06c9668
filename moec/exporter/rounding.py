"""Models in 16 bits: a file may be at most 1.5 times as far from the model in fp32 as the model itself is.

Both round, in other places, so the one says nothing about the other alone. What routers choose differently near ties
is told apart: at inputs where file and model choose the same experts the bar holds for all of them together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moec.backendbase import Weights
from moec.errors import MoecError
from moec.exporter.check import MODEL_BAR, ROUNDED_MODEL_BAR, Check, Met
from moec.exporter.result import ExportReport
from moec.exporter.ways import Way
from moec.exporter.written_region import WrittenRegion
from moec.frontends.torch.lifted import Lifted
from moec.verify import LOW_PRECISION_FACTOR, verify_layer

# Of the choices of a model's routers in fp16: near ties are as frequent as its rounding is coarse.
LEAST_LOW_AGREEMENT = 0.98
# Rounding alone takes no model this far from fp32.
OFF_MODEL = 1e-2


@dataclass(frozen=True)
class Gaps:
    """Squares of the file's and of the model's own distance from fp32, and of what they are relative to."""

    mine: float = 0.0
    own: float = 0.0
    size: float = 0.0

    def plus(self, other: Gaps) -> Gaps:
        return Gaps(self.mine + other.mine, self.own + other.own, self.size + other.size)

    @property
    def mine_off(self) -> float:
        return (self.mine / self.size) ** 0.5 if self.size else 0.0

    @property
    def own_off(self) -> float:
        return (self.own / self.size) ** 0.5 if self.size else 0.0


def judge_rounding(
    met: Sequence[Met],
    wide: Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]],
    inputs: Mapping[str, Sequence[torch.Tensor]],
    same_choices: Sequence[bool],
    why: str,
    report: ExportReport,
    *,
    quantized: bool,
) -> Check:
    """Errors against `wide`, the model in fp32. Raises MOEC704 where the model does not run in fp32."""
    check = Check(why=why)
    near: dict[int, Gaps] = {}
    for one, same in zip(met, same_choices, strict=True):
        check.labels.append(one.label)
        exact = _in_fp32(wide, inputs[one.label])
        for place, (mine, theirs, right) in enumerate(zip(one.mine, one.theirs, exact, strict=True)):
            gaps = _gaps(check, one.label, mine, theirs, right)
            check.max_error = max(check.max_error, gaps.mine_off)
            report.original_error = max(report.original_error or 0.0, gaps.own_off)
            if same:
                more = ROUNDED_MODEL_BAR if quantized else OFF_MODEL
                check.why = check.why or _too_far(gaps, one.label, more=more)
            # Beyond that the model itself chose other experts than in fp32, which would cover rounding up.
            if same and not quantized and gaps.own_off <= OFF_MODEL:
                near[place] = near.get(place, Gaps()).plus(gaps)
    for gaps in near.values():
        check.why = check.why or _too_far(gaps, "all inputs together")
    if not near and not quantized:
        report.notes.append("routers met near ties at every size, so what rounding costs was not compared closely")
    return check


def _too_far(gaps: Gaps, label: str, more: float = 0.0) -> str:
    """In words where the file is further from fp32 than it may be; empty where it is not."""
    if gaps.mine_off <= max(LOW_PRECISION_FACTOR * gaps.own_off, MODEL_BAR) + more:
        return ""
    return f"{label}: error {gaps.mine_off:.1e} against fp32, from which the model itself is {gaps.own_off:.1e}"


def _in_fp32(
    wide: Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]], given: Sequence[torch.Tensor]
) -> Sequence[torch.Tensor]:
    try:
        return wide(given)
    except Exception as error:  # whatever the user's model raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        what = f"the model does not run in fp32, which its file in 16 bits is measured against: {reason}"
        raise MoecError(
            "MOEC704", what, hint="types that the model's code names do not follow its parameters"
        ) from error


def _gaps(check: Check, label: str, mine: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> Gaps:
    """How far both are from fp32, where the model itself has numbers; `check` is told of another kind of result."""
    if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
        found = f"{mine.dtype}{list(mine.shape)} instead of {theirs.dtype}{list(theirs.shape)}"
        check.why = check.why or f"{label}: {found}"
        return Gaps()
    if not theirs.is_floating_point():
        return Gaps(float((mine != theirs).sum()), float((theirs != exact).sum()), float(theirs.numel()))
    finite = torch.isfinite(exact) & torch.isfinite(theirs)
    a, b, c = (torch.where(finite, one.double(), 0) for one in (mine, theirs, exact))
    if not bool(torch.isfinite(a).all()):
        check.why = check.why or f"{label}: other values are not finite"
        return Gaps()
    return Gaps(float((a - c).square().sum()), float((b - c).square().sum()), float(c.square().sum()))


def check_lifted(lifted: Lifted, way: Way, weights: Weights, providers: Sequence[Any]) -> Check:
    """A layer in 16 bits as it will be written, in its module's place, against the module in 16 bits and in fp32."""
    written = WrittenRegion(way.region, weights, way.form, providers)
    verdict = verify_layer(
        lifted.original,
        lambda *args, **kwargs: lifted.call(lifted.module, written, args, kwargs),
        lifted.probes(),
        bar=0.0,
        low_precision=lifted.dtype,
    )
    check = Check(verdict.max_error, verdict.max_abs_error, verdict.bar, labels=verdict.probes)
    if not verdict.passed:
        check.why = f"{verdict.failing}: {verdict.why}" if verdict.failing else "no probe ran"
    return check
