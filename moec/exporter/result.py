"""What an export found and did: plain data, a readable table, JSON. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from moec.jsontext import dumps
from moec.table import milliseconds, number, size, table


@dataclass
class ExportedLayer:
    """One candidate layer: how it is written, or why it is not."""

    name: str
    kind: str
    status: Literal["rewritten", "left alone"]
    lowering: str = ""
    """In words: how its products are written."""
    reason: str = ""
    max_error: float | None = None
    """The worst ||a-b|| / ||b|| against the original layer, over routings that are easy to get wrong."""
    max_abs_error: float | None = None
    bar: float | None = None
    choice: str = ""
    """Which way was the fastest among several, and how that is known."""
    tried: list[str] = field(default_factory=list)
    """Lowerings that did not pass, and why."""
    evidence: tuple[str, ...] = ()


@dataclass
class ExportReport:
    """One export."""

    source: str
    path: Path
    target: str
    quantize: str | None = None
    layers: list[ExportedLayer] = field(default_factory=list)
    whole_model_error: float | None = None
    """The worst ||a-b|| / ||b|| over the outputs and over shapes that were not traced."""
    original_error: float | None = None
    """Of a model in 16 bits, how far it is itself from the same in fp32, which the file's errors are taken against."""
    checked_as: str = ""
    """In words, where not the file itself was checked."""
    whole_model_shapes: list[str] = field(default_factory=list)
    routing_agreement: float | None = None
    """The share of choices that the file makes as the original does."""
    opset: int = 0
    least_onnxruntime: str = ""
    file_bytes: int = 0
    """The file, with the data beside it."""
    load_seconds: float | None = None
    memory_bytes: int | None = None
    """What the process grew by while the file was loaded and run."""
    peak_bytes: int | None = None
    """The most that loading it and one run add in a process that holds nothing but ONNX Runtime; of static files."""
    seconds: float = 0.0
    latency: list[dict[str, Any]] = field(default_factory=list)
    """Rows {tokens, before_ms, after_ms}; empty unless token counts were named."""
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    machine: str = ""

    @property
    def rewritten(self) -> list[ExportedLayer]:
        return [layer for layer in self.layers if layer.status == "rewritten"]

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {**asdict(self), "path": str(self.path)}

    def to_json(self) -> str:
        return dumps(self.to_dict())

    def __str__(self) -> str:
        return "\n".join([self._headline(), "", *self._tables(), "", *self._footer()])

    def _headline(self) -> str:
        count = f"{len(self.rewritten)} of {len(self.layers)} layers rewritten"
        asked = self.target + (f", {self.quantize}" if self.quantize else "")
        return f"moec: {self.source} -> {self.path} ({asked}): {count} in {self.seconds:.1f} s"

    def _tables(self) -> list[str]:
        headers = ["layer", "kind", "status", "written as", "error", "max abs"]
        rows = [
            [
                layer.name or "the model",
                layer.kind,
                layer.status,
                layer.lowering or "-",
                number(layer.max_error),
                number(layer.max_abs_error),
            ]
            for layer in self.layers
        ]
        parts = [table(headers, rows, right=["error", "max abs"])]
        named = [(layer.name or "the model", layer) for layer in self.layers]
        parts += [f"left alone: {name}: {layer.reason}" for name, layer in named if layer.reason]
        parts += [f"{name}: {line}" for name, layer in named for line in layer.tried]
        parts += [f"{name}: {layer.choice}" for name, layer in named if layer.choice]
        if self.latency:
            headers = ["tokens", "before ms", "after ms", "faster"]
            times = [
                [
                    str(row["tokens"]),
                    milliseconds(row["before_ms"]),
                    milliseconds(row["after_ms"]),
                    f"{row['before_ms'] / row['after_ms']:.2f}x",
                ]
                for row in self.latency
            ]
            parts += ["", table(headers, times, right=headers)]
        return parts

    def _footer(self) -> list[str]:
        parts = []
        if self.whole_model_error is not None:
            shapes = ", ".join(self.whole_model_shapes)
            own = "" if self.original_error is None else f" against fp32 (its own {number(self.original_error)})"
            parts.append(f"whole model: error {number(self.whole_model_error)}{own} at {shapes}")
        if self.checked_as:
            parts.append(f"checked as {self.checked_as}")
        if self.routing_agreement is not None:
            parts.append(f"routing: {self.routing_agreement:.2%} of the choices agree")
        loaded = "" if self.load_seconds is None else f", loads in {self.load_seconds:.2f} s"
        memory = "" if self.memory_bytes is None else f", {size(self.memory_bytes)} of memory"
        memory += "" if self.peak_bytes is None else f", {size(self.peak_bytes)} at its peak in a process of its own"
        needs = f"opset {self.opset}, ONNX Runtime {self.least_onnxruntime} or newer"
        parts.append(f"file: {size(self.file_bytes)}{loaded}{memory}; {needs}")
        parts += [f"note: {note}" for note in self.notes]
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return [*parts, " | ".join(part for part in (self.machine, versions) if part)]
