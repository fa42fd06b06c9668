"""Numbers of the oracle: plain Python floats, one element at a time, and how far a result may be from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Half the distance of neighbours at 1: how much one rounding may move a number.
ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# Half the smallest distance of neighbours near 0.
SMALLEST = {torch.float64: 0.0, torch.float32: 2.0**-150, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}
# The error of one step in the type that sums are kept in.
STEP = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-24}

Matrix = list[list[float]]


@dataclass(frozen=True)
class Sum:
    """An exact sum and the sum of its terms' sizes, which bounds the error of summing in fewer digits."""

    value: float
    size: float
    steps: int

    @staticmethod
    def of(terms: Sequence[float]) -> Sum:
        """The sum of these terms; not-a-numbers and infinities go through as in any order of summing."""
        special = [term for term in terms if not math.isfinite(term)]
        value = sum(special) if special else math.fsum(terms)
        return Sum(value, sum(abs(term) for term in terms), len(terms) + 2)


def listed(tensor: torch.Tensor) -> list[float]:
    """The elements in order, as f64."""
    found: list[float] = tensor.detach().to(torch.float64).flatten().tolist()
    return found


def matrix(tensor: torch.Tensor) -> Matrix:
    """The rows of a tensor of two sizes."""
    found: Matrix = tensor.detach().to(torch.float64).tolist()
    return found


def ints(tensor: torch.Tensor) -> list[int]:
    """The elements in order."""
    found: list[int] = tensor.flatten().tolist()
    return found


def check_sums(found: torch.Tensor, expected: Sequence[Sequence[Sum]], *, roundings: float = 1.0) -> None:
    """Each element is the exact sum, summed in at least fp32 and then rounded `roundings` times to found's type."""
    rows = matrix(found)
    assert len(rows) == len(expected), f"{len(rows)} rows instead of {len(expected)}"
    for r, (row, wanted) in enumerate(zip(rows, expected, strict=True)):
        assert len(row) == len(wanted), f"{len(row)} columns instead of {len(wanted)}"
        for n, (number, exact) in enumerate(zip(row, wanted, strict=True)):
            check_sum(number, exact, found.dtype, f"[{r}, {n}]", roundings)


def check_sum(number: float, exact: Sum, dtype: torch.dtype, where: str, roundings: float = 1.0) -> None:
    """One element of `check_sums`."""
    if math.isnan(exact.value) or math.isinf(exact.value):
        same = number == exact.value or (math.isnan(number) and math.isnan(exact.value))
        assert same, f"{where}: {number} instead of {exact.value}"
        return
    summing = exact.steps * STEP[dtype] * exact.size
    # A sum just beside the middle of two neighbours may be rounded to either.
    allowed = roundings * ROUNDING[dtype] * (abs(exact.value) + summing) * 1.0001 + summing + SMALLEST[dtype]
    gap = abs(number - exact.value)
    assert gap <= allowed, f"{where}: {number} instead of {exact.value}, apart {gap:.3e}, allowed {allowed:.3e}"


def check_close(found: torch.Tensor, expected: Sequence[float], *, steps: float = 8, roundings: float = 1.0) -> None:
    """Elements computed in at least fp32 by `steps` operations, then rounded once."""
    numbers = listed(found)
    assert len(numbers) == len(expected)
    for i, (number, exact) in enumerate(zip(numbers, expected, strict=True)):
        check_sum(number, Sum(exact, abs(exact), int(steps)), found.dtype, f"[{i}]", roundings)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit by bit, not-a-numbers and signs of zero included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
    kind = kinds[a.element_size()]
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))
