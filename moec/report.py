"""What moec found and did, layer by layer: plain data, a readable table, JSON. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from moec.errors import MoecError
from moec.jsontext import dumps
from moec.table import milliseconds, number, size, table

Status = Literal["compiled", "left alone"]
Kind = Literal["moe", "ffn"]


@dataclass
class LayerReport:
    """One candidate layer: what became of it and why."""

    name: str
    """The module's path in the model, as named_modules() gives it."""
    kind: Kind
    status: Status
    reason: str = ""
    """Why it was left alone; empty for a compiled layer."""
    max_error: float | None = None
    """The worst ||a-b|| / ||b|| over the probes against the original in fp32; None if it was not verified."""
    max_abs_error: float | None = None
    """The worst max|a-b| / max|b| over the probes."""
    bar: float | None = None
    """What max_error may be at most."""
    backend: str | None = None
    passes: tuple[str, ...] = ()
    fallbacks: int = 0
    """Calls that went to the original forward since compilation."""
    fallback_reasons: dict[str, int] = field(default_factory=dict)
    """Why, with the number of calls for each reason."""
    cut: Literal["submodule", "slice", "ffn"] | None = None
    evidence: tuple[str, ...] = ()
    probes: tuple[str, ...] = ()
    """What it was run on against the original, in this order; a probe that the original refuses says nothing."""
    worst_probe: str | None = None
    """The probe with max_error."""
    failing_probe: str | None = None
    tried: tuple[str, ...] = ()
    """For a candidate that is none: each module that was looked at, with what stood in the way there."""
    numerics_error: float | None = None
    """The error that passes which change numerics (int8, dropped tokens) cause; None if none ran."""
    bytes_before: int | None = None
    bytes_after: int | None = None
    bytes_peak: int | None = None
    ir_before: str = ""
    ir_after: str = ""
    ir_named: str = ""
    """The layer from its router's logits on, with routing and capacity as ops, where they were proved by value."""
    pass_logs: tuple[tuple[str, tuple[str, ...], tuple[str, ...], str], ...] = ()
    """Per pass: its name, what it did, what it skipped and why, the diff."""
    plan: str = ""
    """What the back end runs, in its own words."""
    latency: list[dict[str, Any]] = field(default_factory=list)
    """Rows {tokens, before_ms, after_ms, ...}; empty until measured."""

    @property
    def compiled(self) -> bool:
        return self.status == "compiled"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


Measurer = Callable[[Sequence[int]], None]


@dataclass
class Report:
    """All layers of one compilation, with what is needed to repeat it."""

    layers: list[LayerReport] = field(default_factory=list)
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    machine: str = ""
    whole_model_error: float | None = None
    notes: list[str] = field(default_factory=list)
    latency: list[dict[str, Any]] = field(default_factory=list)
    """End-to-end rows {tokens, before_ms, after_ms, ...}; empty until measured."""
    measurer: Measurer | None = field(default=None, repr=False, compare=False)
    """Set by the API: times the model and fills in latency."""

    @property
    def compiled(self) -> list[LayerReport]:
        return [layer for layer in self.layers if layer.compiled]

    def to_dict(self) -> dict[str, Any]:
        """What report.schema.json describes: JSON types only."""
        return {
            "layers": [layer.to_dict() for layer in self.layers],
            "seconds": self.seconds,
            "versions": dict(self.versions),
            "machine": self.machine,
            "whole_model_error": self.whole_model_error,
            "notes": list(self.notes),
            "latency": list(self.latency),
        }

    def to_json(self) -> str:
        return dumps(self.to_dict())

    def measure(self, *, tokens: Sequence[int] = (1, 8, 64, 512)) -> Report:
        """Time every compiled layer and the model, before and after, for each number of tokens; fills in latency."""
        if self.measurer is None:
            raise MoecError(
                "MOEC504",
                "this report cannot measure: no model stands behind it",
                hint="measure on the report of moec.compile(model).moec.report; explain() compiles nothing to time",
            )
        if not tokens or not all(map(_positive, tokens)):
            raise MoecError(
                "MOEC502", f"tokens={tokens!r} must be positive whole numbers", hint="tokens=[1, 8, 64, 512]"
            )
        self.measurer(tuple(tokens))
        return self

    def __str__(self) -> str:
        return "\n".join(part for part in (self._headline(), *self._tables(), *self._footer()) if part)

    def summary(self) -> str:
        """The headline, and each layer left alone with the reason."""
        return "\n".join((self._headline(), *self._left_alone()))

    def _left_alone(self) -> list[str]:
        """One line for each reason, with the layers it holds for."""
        names: dict[str, list[str]] = {}
        for layer in self.layers:
            if not layer.compiled:
                names.setdefault(layer.reason, []).append(f"{layer.name or 'the model'} ({layer.kind})")
        return [f"left alone: {_some(layers)}: {reason}" for reason, layers in names.items()]

    def _fell_back(self) -> list[str]:
        """One line for each layer and reason for which its original forward served calls."""
        return [
            f"fell back: {layer.name or 'the model'} ({layer.kind}): {_calls(count)}: {reason}"
            for layer in self.layers
            for reason, count in layer.fallback_reasons.items()
        ]

    def _headline(self) -> str:
        if not self.layers:
            return "moec: no MoE or FFN layer found"
        return f"moec: {len(self.compiled)} of {len(self.layers)} layers compiled in {self.seconds:.1f} s"

    def _tables(self) -> list[str]:
        parts = []
        if self.layers:
            headers = ["layer", "kind", "status", "error", "max abs", "back end", "passes"]
            parts += ["", table(headers, [_row(layer) for layer in self.layers], right=["error", "max abs"])]
        left = self._left_alone()
        parts += ["", *left] if left else []
        fell = self._fell_back()
        parts += ["", *fell] if fell else []
        rows = [row for layer in self.layers for row in _latency_rows(layer.name, layer.latency)]
        rows += _latency_rows("whole model", self.latency)
        if rows:
            headers = ["latency", "tokens", "before ms", "after ms", "faster"]
            parts += ["", table(headers, rows, right=headers[1:])]
        return parts

    def _footer(self) -> list[str]:
        parts = []
        if self.whole_model_error is not None:
            parts.append(f"whole model: error {number(self.whole_model_error)}")
        before, after = (
            sum(getattr(layer, which) or 0 for layer in self.compiled) for which in ("bytes_before", "bytes_after")
        )
        if before and after and after != before:
            parts.append(f"weights of compiled layers: {size(before)} before, {size(after)} after")
        calls = sum(layer.fallbacks for layer in self.layers)
        if calls:
            parts.append(f"{_calls(calls)} fell back to the original forward")
        parts += [f"note: {note}" for note in self.notes]
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        parts += [" | ".join(part for part in (self.machine, versions) if part)]
        return ["", *parts] if any(parts) else []


def _calls(count: int) -> str:
    return f"{count} call{'' if count == 1 else 's'}"


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _positive(count: object) -> bool:
    return isinstance(count, int) and not isinstance(count, bool) and count > 0


def _row(layer: LayerReport) -> list[str]:
    error = number(layer.max_error)
    if layer.compiled and layer.max_error is None:
        error = "not checked"
    elif layer.numerics_error is not None:
        error += f" (+{number(layer.numerics_error)} asked for)"
    return [
        layer.name,
        layer.kind,
        layer.status + (f", {_calls(layer.fallbacks)} not" if layer.fallbacks else ""),
        error,
        number(layer.max_abs_error),
        layer.backend or "-",
        ", ".join(layer.passes) or "-",
    ]


def _latency_rows(name: str, latency: Sequence[dict[str, Any]]) -> list[list[str]]:
    return [
        [
            name,
            str(row["tokens"]),
            milliseconds(row["before_ms"]),
            milliseconds(row["after_ms"]),
            f"{row['before_ms'] / row['after_ms']:.2f}x",
        ]
        for row in latency
    ]
