"""From counts of kept slots to sizes: every way of rounding, and counts that are none."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from moec.frontends.torch.capacitysize import capacities, told_apart_at

TRIED = (*range(1, 20), 31, 32, 33, 48, 64, 65, 100, 128)


def counted(size: Callable[[int], int]) -> dict[int, int]:
    return {tokens: min(tokens, size(tokens)) for tokens in TRIED}


@pytest.mark.parametrize(
    ("size", "experts", "text"),
    [
        (lambda t: math.ceil(1.25 * t / 4), 4, "ceil(5/16 T)"),
        (lambda t: max(2, int(1.25 * t / 4)), 4, "floor(5/16 T), but at least 2,"),
        (lambda t: max(4, math.ceil(t / 4)), 4, "ceil(1/4 T), but at least 4,"),
        (lambda t: 64, 4, "64"),
        (lambda t: 3, 4, "3"),
        (lambda t: 4 * math.ceil(math.ceil(1.25 * t / 4) / 4), 4, "4 ceil(5/16 T / 4)"),
        (lambda t: 8 * math.ceil(int(1.25 * t / 4) / 8), 4, "8 ceil(floor(5/16 T) / 8)"),
        (lambda t: t // 3 + 1, 3, "floor(1/3 T) + 1"),
        (lambda t: int(0.5 * t / 4), 4, "floor(1/8 T)"),
    ],
)
def test_sizes_are_found_and_hold_where_they_were_not_tried(
    size: Callable[[int], int], experts: int, text: str
) -> None:
    kept = counted(size)
    for _ in range(8):
        more = told_apart_at(capacities(kept, experts), kept, 520)
        if more is None:
            break
        kept[more] = min(more, size(more))
    found = capacities(kept, experts)[0]
    assert found.text("T") == text
    expression = found.size("T")
    for tokens in range(1, 520):
        assert found.at(tokens) == size(tokens) == expression.evaluate({"T": tokens})


def test_counts_that_are_no_size() -> None:
    assert capacities(counted(math.isqrt), 4) == []
    assert capacities(counted(lambda t: t), 4) == []
    assert capacities({8: 4, 16: 3}, 4) == []


@pytest.mark.parametrize(("factor", "delicate"), [(1.25, None), (1.1, 40)])
def test_factors_that_floats_do_not_hold_are_known(factor: float, delicate: int | None) -> None:
    assert capacities(counted(lambda t: math.ceil(factor * t / 4)), 4)[0].delicate == delicate
