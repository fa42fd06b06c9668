"""What random regions are made with: a builder that comes up with operands, and strategies for names and numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from moec.ir import FLOATS, FUNCTIONS, Builder, Constant, Dim, Tensor, Value, Weight

NUMBERS = st.floats(0.0078125, 1e6, allow_nan=False, width=32)
NAMES = st.text("abcxyz_.019", min_size=1, max_size=6).filter(lambda name: name[0] != ".")
STRINGS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


class Making:
    """A builder that can come up with operands."""

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        self.draw = draw
        self.builder = Builder(draw(st.one_of(NAMES, STRINGS.filter(str.isprintable))))
        self.tokens = Dim.of("T")
        self.k: int = draw(st.integers(1, 4))
        self.experts: int = draw(st.integers(1, 6))
        self.dtype = draw(st.sampled_from(FLOATS))

    def value(self, dtype: str, *shape: int | Dim) -> Value:
        """A value of this type: one that is there, an input, a weight or a constant."""
        type = Tensor.of(dtype, *shape)
        there = [value for value in self._values() if value.type == type]
        if there and self.draw(st.booleans()):
            return self.draw(st.sampled_from(there))  # type: ignore[no-any-return]
        name = self.draw(NAMES)
        kind = self.draw(st.sampled_from(["input", "weight", "constant"]))
        if kind == "weight":
            ref = f"{self.draw(STRINGS)}{len(self.builder.nodes)}"
            return self.builder.add(Weight(ref=ref, type=type), name)
        if kind == "constant":
            return self.builder.add(Constant(value=self.draw(st.sampled_from([0.0, 1.0])), type=type), name)
        return self.builder.input(self.builder.names.fresh(name) + "_in", type)

    def _values(self) -> list[Value]:
        return [*self.builder.inputs, *(value for node in self.builder.nodes for value in node.results)]

    def some(self, dtype: str, *shape: int | Dim) -> Value | None:
        """A value or None."""
        return self.value(dtype, *shape) if self.draw(st.booleans()) else None

    def width(self) -> int:
        return self.draw(st.integers(1, 9))  # type: ignore[no-any-return]

    def slots(self) -> Dim:
        return self.k * self.tokens

    def activation(self) -> dict[str, Any]:
        fn = self.draw(st.sampled_from(FUNCTIONS))
        limit = self.draw(st.one_of(st.none(), NUMBERS))
        return {
            "fn": fn,
            "alpha": self.draw(NUMBERS) if fn == "silu" else 1.0,
            "limit": limit,
            "clamp_after": limit is not None and self.draw(st.booleans()),
        }
