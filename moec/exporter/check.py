"""Whether what was written computes what the original computes: each region alone, then the whole model.

T tokens, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moec.backendbase import Weights, load_backend
from moec.backends.onnx.form import Form
from moec.backends.onnx.providers import CPU
from moec.exporter.probes import region_probes
from moec.exporter.written_region import WrittenRegion
from moec.ir import Region
from moec.verify import difference

# Rounding to this many bits was asked for; a larger error is no rounding.
ROUNDED_BARS = {8: 0.1, 4: 0.3}
# Of a whole model in fp32, whose other layers round as well; the layers themselves are held to their own bar.
MODEL_BAR = 1e-4
# Of whole models with rounded weights: beyond this the file says nothing about the model, and that is no rounding.
ROUNDED_MODEL_BAR = 1.0
# Routers of whole models may meet near ties; more than this is another router.
LEAST_AGREEMENT = 0.995
LOW_BARS = {"f16": 4e-3, "bf16": 3e-2}


@dataclass
class Check:
    """The worst errors, and what failed."""

    max_error: float = 0.0
    max_abs_error: float = 0.0
    bar: float = 0.0
    loose: float = 1.0
    """How many times the bar the largest single difference may be."""
    why: str = ""
    labels: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.why and bool(self.labels)

    def add(self, label: str, mine: torch.Tensor, theirs: torch.Tensor) -> None:
        """Compare one result of one probe."""
        found = difference(mine, theirs)
        self.max_error, self.max_abs_error = max(self.max_error, found.l2), max(self.max_abs_error, found.largest)
        if found.mismatch or not (found.l2 <= self.bar and found.largest <= self.loose * self.bar):
            self.why = self.why or f"{label}: {found.mismatch or f'error {found.l2:.1e} above {self.bar:.0e}'}"


def check_region(
    exact: Region, region: Region, weights: Weights, form: Form, bar: float, providers: Sequence[Any] = (CPU,)
) -> Check:
    """The region as it will be written, in ONNX Runtime, against the exact region by the meaning of its ops."""
    low = LOW_BARS.get(region.inputs[0].type.dtype, 0.0)
    quantized = exact != region or form.rounds_weights
    check = Check(bar=ROUNDED_BARS[form.bits] if quantized else max(bar, low), loose=10.0 if quantized else 1.0)
    judge = load_backend("reference").build(exact, weights, {})
    try:
        written = WrittenRegion(region, weights, form, providers)
    except Exception as error:  # ONNX Runtime's errors have no common class
        check.why = f"ONNX Runtime does not load it: {str(error).strip().splitlines()[0][:200]}"
        return check
    for label, inputs in region_probes(region, nonnegative=form.experts != "sorted"):
        theirs = judge(*inputs)
        try:
            mine = written(*inputs)
        except Exception as error:  # ONNX Runtime's errors have no common class
            check.why = check.why or f"{label}: {str(error).splitlines()[0][:200]}"
            return check
        check.labels.append(label)
        for a, b in zip(mine, theirs, strict=True):
            check.add(label, a, b)
    return check


@dataclass(frozen=True)
class Met:
    """What file and original make of one input."""

    label: str
    mine: list[torch.Tensor]
    theirs: Sequence[torch.Tensor]
    more: list[torch.Tensor]
    """What the file gives beyond the original's results."""


def run_probes(
    original: Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]],
    after: Callable[[Sequence[torch.Tensor]], list[torch.Tensor]],
    probes: Sequence[tuple[str, list[torch.Tensor]]],
) -> tuple[list[Met], str]:
    """Both on each input that the original takes, and why that ended or could not begin; empty where it did not."""
    met: list[Met] = []
    for label, inputs in probes:
        try:
            theirs = original(inputs)
        except Exception:  # the original refuses this size, so there is nothing to compare
            continue
        try:
            mine = after(inputs)
        except Exception as error:  # ONNX Runtime's errors have no common class
            return met, f"{label}: {str(error).splitlines()[0][:200]}"
        met.append(Met(label, mine[: len(theirs)], theirs, mine[len(theirs) :]))
    return met, "" if met else "the original runs at no other shape than the one it was traced with"


def agreement(mine: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> tuple[int, int]:
    """How many choices are the same, and how many there are: experts[T, K] of each layer, in any order of K."""
    same = total = 0
    for a, b in zip(mine, theirs, strict=True):
        total += b.numel()
        if a.shape != b.shape:  # a size that the model computes was fixed while it was traced
            continue
        same += int((a.long().sort(-1).values == b.long().sort(-1).values).sum())
    return same, total
