"""What a value of the IR is: an element type and symbolic sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from moec.errors import MoecError, did_you_mean
from moec.ir.dim import Dim
from moec.ir.dim_floor import ceildiv, floordiv
from moec.ir.dim_min import maximum, minimum

__all__ = ["DTYPES", "FLOATS", "INDICES", "Dim", "Tensor", "ceildiv", "floordiv", "maximum", "minimum"]

# Bytes per element.
DTYPES: Mapping[str, int] = {"f64": 8, "f32": 4, "f16": 2, "bf16": 2, "i8": 1, "i32": 4, "i64": 8, "bool": 1}
FLOATS = ("f64", "f32", "f16", "bf16")
INDICES = ("i32", "i64")


@dataclass(frozen=True)
class Tensor:
    """The type of a value, printed `f32[T, 64]`. `Tensor.of("f32", "T", 64)` reads better than the constructor.

    Raises MOEC101 for an element type that is not in DTYPES.
    """

    dtype: str
    shape: tuple[Dim, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            hint = did_you_mean(self.dtype, DTYPES) or f"one of {', '.join(DTYPES)}"
            raise MoecError("MOEC101", f'unknown element type "{self.dtype}"', hint=hint)

    @staticmethod
    def of(dtype: str, *shape: int | str | Dim) -> Tensor:
        """A tensor type from an element type and sizes as numbers, text or sizes."""
        return Tensor(dtype, tuple(Dim.of(size) for size in shape))

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"

    @property
    def rank(self) -> int:
        """The number of sizes."""
        return len(self.shape)

    @property
    def letters(self) -> frozenset[str]:
        """The letters that the sizes depend on."""
        return frozenset().union(*(size.letters for size in self.shape))

    @property
    def is_float(self) -> bool:
        """Whether elements are floating point."""
        return self.dtype in FLOATS

    def with_dtype(self, dtype: str) -> Tensor:
        """The same shape with another element type."""
        return Tensor(dtype, self.shape)

    def substitute(self, sizes: Mapping[str, int | Dim]) -> Tensor:
        """The type with letters replaced."""
        return Tensor(self.dtype, tuple(size.substitute(sizes) for size in self.shape))

    def evaluate(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape when each letter has the given size. Raises MOEC108 where a size has no value or is negative."""
        shape = tuple(size.evaluate(sizes) for size in self.shape)
        if any(size < 0 for size in shape):
            raise MoecError("MOEC108", f"shape {self} is {list(shape)}: a size is negative")
        return shape

    def num_elements(self, sizes: Mapping[str, int]) -> int:
        """The number of elements when each letter has the given size."""
        return prod(self.evaluate(sizes))

    def num_bytes(self, sizes: Mapping[str, int]) -> int:
        """The size in memory when each letter has the given size."""
        return self.num_elements(sizes) * DTYPES[self.dtype]
