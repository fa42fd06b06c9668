"""What the demo found, as data: the same for the screen and for --json. Imports no torch."""

from dataclasses import asdict, dataclass, field
from typing import Any

from moec.benchresult import Timing
from moec.report import LayerReport, Report
from moec.table import number


@dataclass(frozen=True)
class Accuracy:
    """Predictions on the held-out digits by the model as it was and as compiled."""

    images: int
    right_before: int
    right_after: int
    changed: int
    """Images for which the two predict different digits."""
    logit_error: float
    """||a-b|| / ||b|| over all logits."""


@dataclass(frozen=True)
class Batch:
    """Latency of the whole model on a batch of images; each image is 16 tokens."""

    images: int
    tokens: int
    before: Timing
    after: Timing

    @property
    def speedup(self) -> float:
        return self.before.median_ms / self.after.median_ms


@dataclass
class Variant:
    """The model compiled in one way, with what came of it."""

    call: str
    """How to write it: moec.compile(model, ...)."""
    exact: bool
    """Nothing was asked for that changes results, so the predictions must be the same."""
    report: Report
    accuracy: Accuracy
    latency: list[Batch] = field(default_factory=list)

    @property
    def first_moe(self) -> LayerReport | None:
        return next((layer for layer in self.report.compiled if layer.kind == "moe"), None)

    def problems(self) -> list[str]:
        """What makes the demo a failure; empty when all is well."""
        found = [f"{layer.name} was left alone: {layer.reason}" for layer in self.report.layers if not layer.compiled]
        if self.first_moe is None:
            found.append("no MoE layer was compiled")
        for layer in self.report.compiled:
            if layer.max_error is None or layer.bar is None:
                found.append(f"{layer.name} was not verified")
            elif not layer.max_error <= layer.bar:  # so that NaN is a problem too
                found.append(f"{layer.name}: error {number(layer.max_error)} is above the bar {number(layer.bar)}")
            if layer.fallbacks:
                found.append(f"{layer.name}: the original forward served {layer.fallbacks} of the calls")
        if self.exact and self.accuracy.changed:
            found.append(f"{self.accuracy.changed} of {self.accuracy.images} predictions changed")
        return found

    def to_dict(self) -> dict[str, Any]:
        return {
            "call": self.call,
            "exact": self.exact,
            "report": self.report.to_dict(),
            "accuracy": asdict(self.accuracy),
            "latency": [{**asdict(batch), "speedup": batch.speedup} for batch in self.latency],
            "problems": self.problems(),
        }


@dataclass
class Findings:
    """The whole demo: the model, the machine, and each way in which it was compiled."""

    model: str
    parameters: int
    machine: str
    device: str
    threads: int
    versions: dict[str, str]
    variants: list[Variant] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def where(self) -> str:
        """What computes: CPU, 2 threads."""
        return f"{self.device}, {self.threads} thread{'' if self.threads == 1 else 's'}"

    def problems(self) -> list[str]:
        return [f"{variant.call}: {problem}" for variant in self.variants for problem in variant.problems()]

    def to_dict(self) -> dict[str, Any]:
        return {
            "ok": not self.problems(),
            "problems": self.problems(),
            "model": self.model,
            "parameters": self.parameters,
            "machine": self.machine,
            "device": self.device,
            "threads": self.threads,
            "versions": dict(self.versions),
            "variants": [variant.to_dict() for variant in self.variants],
            "seconds": self.seconds,
        }
