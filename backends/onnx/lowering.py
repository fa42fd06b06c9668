"""A region on its way to ONNX: its values as nodes' outputs, or as weights that no node has asked for yet.

E experts, N outputs, C inputs, R rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moec.backends.onnx.emitter import Emitter
from moec.backends.onnx.form import EXACT, Form
from moec.backends.reference.joined import Experts, whole
from moec.ir import Dim, Route, Value


@dataclass(frozen=True)
class Groups:
    """Rows sorted by expert: how many each of the E experts has, and behind them how many belong to none."""

    counts: Any
    """int64[E+1]."""
    left_out: Any | None
    """The last of counts, an int64 scalar; None where every row belongs to an expert."""


class Lowering:
    """What the lowerings of ops share."""

    def __init__(self, emit: Emitter, held: Mapping[str, Experts], *, form: Form = EXACT) -> None:
        self.emit, self.held, self.form = emit, held, form
        self.values: dict[str, Any] = {}
        self.groups: dict[str, Groups] = {}
        # Ids that a router chose are experts; others may mean "no expert".
        self.chosen: set[str] = set()
        # Weights that are known to sum to one for every token.
        self.sums_to_one: set[str] = set()
        # Routers that the node behind them has inside, by the name of their weights.
        self.routers: dict[str, Route] = {}

    def value(self, value: Value) -> Any:
        """The value as an output of a node; a weight becomes an initializer when first asked for."""
        if value.name not in self.values:
            self.values[value.name] = self.emit.tensor(value.name, whole(self.held[value.name]))
        return self.values[value.name]

    def maybe(self, value: Value | None) -> Any | None:
        """An operand that may be absent."""
        return None if value is None else self.value(value)

    def wide(self, value: Value) -> Any:
        """The value in the type that sums are kept in: f64 for f64, f32 for all else."""
        found = self.value(value)
        return self.emit.cast(found, "f32") if value.type.dtype in ("f16", "bf16", "i8") else found

    def rounded(self, found: Any, dtype: str, kind: str = "") -> Any:
        """What was computed in `kind`, or in the wide type of `dtype`, in a value's own type."""
        return found if dtype == (kind or wide_dtype(dtype)) else self.emit.cast(found, dtype)

    def is_weight(self, value: Value) -> bool:
        """Whether the elements are known now."""
        return value.name in self.held

    def expert(self, value: Value, e: int) -> Any:
        """One expert's part of a weight, as an initializer; of a value that is no weight, as a node."""
        if self.is_weight(value):
            return self.emit.tensor(f"{value.name}.{e}", self.held[value.name][e])
        return self.emit.op("Gather", self.value(value), self.emit.number(e), axis=0, name="expert")

    def matrix(self, value: Value, e: int) -> torch.Tensor:
        """One expert's part of a weight whose elements are known now."""
        return self.held[value.name][e]

    def size(self, size: Dim) -> Any:
        """A size in a call: a whole number, or an int64 scalar."""
        return self.emit.size(size)

    def define(self, values: Sequence[Value], found: Sequence[Any]) -> None:
        """Enter the results of a node."""
        for value, one in zip(values, found, strict=True):
            self.values[value.name] = one


def wide_dtype(*dtypes: str) -> str:
    """The type that sums over these are kept in."""
    return "f64" if "f64" in dtypes else "f32"
