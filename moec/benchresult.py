"""What a benchmark found: rows of latency before and after, as a table and as JSON. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from moec.jsontext import dumps
from moec.report import LayerReport, Report
from moec.table import milliseconds, table


@dataclass(frozen=True)
class Timing:
    """Some runs of one function, in milliseconds: their median and the middle 80 % of them."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    runs: int

    def __str__(self) -> str:
        return f"{milliseconds(self.median_ms)} [{milliseconds(self.p10_ms)}..{milliseconds(self.p90_ms)}]"


@dataclass(frozen=True)
class Row:
    """One layer, or the whole model, at one number of tokens."""

    name: str
    kind: str
    """"moe", "ffn" or "model"."""
    tokens: int
    before: Timing
    after: Timing
    like: tuple[str, ...] = ()
    """Other layers that run the same program and were not timed."""

    @property
    def speedup(self) -> float:
        return self.before.median_ms / self.after.median_ms

    @property
    def title(self) -> str:
        name = self.name or "the model"
        return f"{name} (and {len(self.like)} like it)" if self.like else name

    def latency(self) -> dict[str, Any]:
        """The row as LayerReport.latency has it."""
        return {
            "tokens": self.tokens,
            "before_ms": self.before.median_ms,
            "after_ms": self.after.median_ms,
            "before_spread_ms": [self.before.p10_ms, self.before.p90_ms],
            "after_spread_ms": [self.after.p10_ms, self.after.p90_ms],
            "runs": self.before.runs,
            "measured_on": self.name,
        }


@dataclass
class BenchResult:
    """All rows with what is needed to repeat them."""

    rows: list[Row] = field(default_factory=list)
    machine: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def fill(self, report: Report) -> None:
        """Put the rows where the report keeps latencies; layers that run the same program share them."""
        # One module can hold a MoE and a dense FFN beside it, so a name alone does not tell which.
        layers: dict[tuple[str, str], LayerReport] = {(layer.name, layer.kind): layer for layer in report.layers}
        timed: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            for name in (row.name, *row.like):
                timed.setdefault((name, row.kind), []).append(row)
        for key, rows in timed.items():
            owner: LayerReport | Report = layers.get(key, report)
            owner.latency = [row.latency() for row in rows]
        report.notes += [note for note in self.notes if note not in report.notes]

    def to_dict(self) -> dict[str, Any]:
        """What bench.schema.json describes: JSON types only."""
        rows = [{**asdict(row), "speedup": row.speedup} for row in self.rows]
        return {
            "rows": rows,
            "machine": self.machine,
            "versions": self.versions,
            "settings": self.settings,
            "notes": self.notes,
        }

    def to_json(self) -> str:
        return dumps(self.to_dict())

    def __str__(self) -> str:
        headers = ["latency", "T", "before ms", "after ms", "faster"]
        cells = [
            [row.title, str(row.tokens), str(row.before), str(row.after), f"{row.speedup:.2f}x"] for row in self.rows
        ]
        parts = [table(headers, cells, right=headers[1:])]
        parts += ["", "medians of interleaved runs, [10th..90th percentile]"]
        parts += [", ".join(f"{name} {value}" for name, value in self.settings.items())]
        parts += [self.machine, ", ".join(f"{name} {version}" for name, version in self.versions.items())]
        return "\n".join([*parts, *(f"note: {note}" for note in self.notes)])
