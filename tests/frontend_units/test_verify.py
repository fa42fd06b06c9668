"""When two results count as the same: shapes, dtypes, structure, places of what is not finite, bars, 16 bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moec.verify import (
    FP32_BAR,
    FP32_LONG_BAR,
    FP64_BAR,
    Probe,
    Verdict,
    bar_for,
    compare_results,
    difference,
    verify_layer,
)
from tests.frontend_units.build import rand

INF, MINUS_INF, NAN = float("inf"), float("-inf"), float("nan")


def test_equal_tensors_do_not_differ() -> None:
    for x in (rand(3, 4), torch.tensor([1.0, NAN, INF, -INF]), torch.zeros(0), torch.zeros(2), torch.arange(3)):
        found = difference(x.clone(), x)
        assert (found.l2, found.largest, found.mismatch) == (0.0, 0.0, "")


def test_errors_are_relative() -> None:
    theirs = torch.tensor([3.0, 4.0])
    found = difference(torch.tensor([3.0, 4.5]), theirs)
    assert found.l2 == pytest.approx(0.1)
    assert found.largest == pytest.approx(0.125)
    assert difference(theirs * 1e-20, theirs * 1.1e-20).l2 == pytest.approx(1 / 11)


def test_a_number_where_there_should_be_zero_is_infinitely_wrong() -> None:
    assert difference(torch.tensor([1e-30, 0]), torch.zeros(2)).l2 == INF


@pytest.mark.parametrize("special", [NAN, INF, MINUS_INF])
def test_places_that_are_not_finite_must_be_the_same(special: float) -> None:
    theirs = torch.tensor([1.0, special, 2.0])
    assert difference(theirs.clone(), theirs).mismatch == ""
    for mine in ([1.0, 5.0, 2.0], [special, 1.0, 2.0], [1.0, special, special]):
        assert "finite" in difference(torch.tensor(mine), theirs).mismatch
    for other in (o for o in (NAN, INF, MINUS_INF) if o is not special):
        assert "finite" in difference(torch.tensor([1.0, other, 2.0]), theirs).mismatch


def test_numbers_beside_what_is_not_finite_are_still_compared() -> None:
    assert difference(torch.tensor([1.5, NAN]), torch.tensor([1.0, NAN])).l2 == pytest.approx(0.5)


def test_shape_dtype_and_integers() -> None:
    assert "shape (2,) instead of (2, 1)" in difference(torch.ones(2), torch.ones(2, 1)).mismatch
    assert "dtype torch.float64 instead of torch.float32" in difference(torch.ones(2).double(), torch.ones(2)).mismatch
    assert difference(torch.tensor([1, 2]), torch.tensor([1, 3])).mismatch == "other integers"
    assert difference(torch.tensor([True]), torch.tensor([False])).mismatch == "other integers"


def test_structures_are_compared_leaf_by_leaf() -> None:
    x = rand(3)
    assert compare_results((x, {"logits": x, "n": 3}), (x, {"logits": x, "n": 3})).mismatch == ""
    assert compare_results((x, x), [x, x]).mismatch == "another structure of results"
    assert compare_results((x, 3), (x, 4)).mismatch == "3 instead of 4"
    assert compare_results((x, None), (x, x)).mismatch != ""
    assert compare_results((x, x * 1.5), (x, x)).l2 == pytest.approx(0.5)
    assert compare_results((x * 1.5, x), (x, x)).l2 == pytest.approx(0.5)


def test_bars() -> None:
    assert bar_for(torch.float32, 4096) == FP32_BAR == 2e-6
    assert bar_for(torch.float32, 4097) == FP32_LONG_BAR == 5e-6
    assert bar_for(torch.float64, 10**6) == FP64_BAR


def probes(*inputs: Tensor, judge: Callable[[Tensor], Tensor] | None = None) -> list[Probe]:
    return [
        Probe(f"probe {i}", (x,), {}, None if judge is None else (lambda x=x: judge(x)))  # type: ignore[misc]
        for i, x in enumerate(inputs)
    ]


def verified(
    original: Callable[[Tensor], Any], compiled: Callable[[Tensor], Any], *inputs: Tensor, bar: float = 2e-6
) -> Verdict:
    return verify_layer(original, compiled, probes(*inputs), bar=bar)


def test_a_layer_passes_on_all_probes() -> None:
    verdict = verified(torch.exp, lambda x: x.exp() * (1 + 1e-6), rand(3), rand(4))
    assert verdict.passed
    assert verdict.probes == ["probe 0", "probe 1"]
    assert 0 < verdict.max_error <= 2e-6
    assert 0 < verdict.max_abs_error <= 2e-6


def test_a_layer_fails_at_the_first_probe_that_differs() -> None:
    verdict = verified(torch.relu, lambda x: x, rand(3).abs(), -rand(3).abs(), rand(2))
    assert not verdict.passed
    assert verdict.failing == "probe 1"
    assert verdict.probes == ["probe 0", "probe 1"]


def test_one_element_off_fails_by_the_largest() -> None:
    x = torch.ones(1_000_000)

    def spoiled(x: Tensor) -> Tensor:
        y = x.clone()
        y[5] += 1e-4
        return y

    verdict = verified(torch.clone, spoiled, x)
    assert verdict.max_error < 2e-6
    assert verdict.failing == "probe 0"
    assert "largest" in verdict.why


def test_what_the_original_refuses_says_nothing() -> None:
    def picky(x: Tensor) -> Tensor:
        if len(x) > 3:
            raise ValueError("too many")
        return x

    assert verified(picky, torch.clone, rand(5), rand(2)).probes == ["probe 1"]
    assert not verified(picky, torch.clone, rand(5)).passed


def test_what_the_compiled_layer_raises_is_a_failure() -> None:
    def broken(x: Tensor) -> Tensor:
        raise IndexError("out of range")

    verdict = verified(torch.clone, broken, rand(2))
    assert verdict.failing == "probe 0"
    assert verdict.why == "IndexError: out of range"


def rounded(x: Tensor, unit: float) -> Tensor:
    """x with errors of one relative size, in bf16's own grid."""
    signs = torch.where(torch.arange(x.numel()).view(x.shape) % 2 == 0, 1.0, -1.0)
    return x * (1 + unit * signs)


def low(original: Callable[[Tensor], Any], compiled: Callable[[Tensor], Any], judged: bool = True) -> Verdict:
    x = rand(64, 64)
    given = probes(x, judge=(lambda x: x.double().float()) if judged else None)
    return verify_layer(original, compiled, given, bar=2e-6, low_precision=torch.bfloat16)


def test_sixteen_bits_are_judged_by_the_originals_own_rounding() -> None:
    def original(x: Tensor) -> Tensor:
        return rounded(x, 4e-3)

    assert low(original, lambda x: rounded(x, 5.5e-3)).passed
    assert low(original, lambda x: x).passed
    worse = low(original, lambda x: rounded(x, 6.5e-3))
    assert not worse.passed
    assert "more than 1.5 times the original's" in worse.why


def test_one_probe_in_sixteen_bits_may_be_unlucky_and_all_of_them_not() -> None:
    """A probe of one large token measures a handful of roundings."""

    def verdict(errors: list[float]) -> Verdict:
        given = [Probe(f"probe {i}", (rand(64, 64),), {}, None) for i in range(len(errors))]
        given = [replace(one, judge=lambda one=one: one.args[0]) for one in given]  # type: ignore[misc]
        units = iter(errors)
        return verify_layer(
            lambda x: rounded(x, 4e-3), lambda x: rounded(x, next(units)), given, bar=2e-6, low_precision=torch.bfloat16
        )

    assert verdict([4e-3, 7e-3, 4e-3]).passed
    together = verdict([7e-3, 7e-3, 7e-3])
    assert together.why.endswith("1.5 times the original's 4.00e-03 over all probes")
    assert verdict([4e-3, 9e-3, 4e-3]).failing == "probe 1"


def test_an_original_far_from_the_formula_was_not_understood() -> None:
    verdict = low(lambda x: x * 1.05, lambda x: x * 1.05)
    assert "from the lifted formula in fp32" in verdict.why


def test_sixteen_bits_without_a_judge_are_compared_with_each_other() -> None:
    assert low(lambda x: x, lambda x: rounded(x, 1e-2), judged=False).passed
    assert not low(lambda x: x, lambda x: rounded(x, 5e-2), judged=False).passed


def test_sixteen_bits_keep_what_is_no_number() -> None:
    def spoil(x: Tensor, value: float) -> Tensor:
        y = x.clone()
        y[0, 0] = value
        return y

    x = spoil(rand(8, 8), NAN)
    judged = [Probe("nan", (x,), {}, x.clone)]

    def run(compiled: Callable[[Tensor], Tensor]) -> Verdict:
        return verify_layer(torch.clone, compiled, judged, bar=2e-6, low_precision=torch.bfloat16)

    assert run(torch.clone).passed
    assert run(lambda x: spoil(x, 1.0)).why == "a number where the original has none"
    assert not run(lambda x: spoil(x, 1.0).index_fill(0, torch.tensor([3]), NAN)).passed


class Cache:
    """Like a cache of keys and values: an object that equals nothing but itself."""

    def __init__(self, keys: torch.Tensor, kind: str = "dynamic", inner: object = None) -> None:
        self.keys, self.kind, self.inner = keys, kind, inner


def test_objects_are_compared_by_what_they_hold() -> None:
    x = torch.randn(3)
    same = compare_results((x, Cache(x, inner=[Cache(x)])), (x, Cache(x.clone(), inner=[Cache(x.clone())])))
    assert (same.mismatch, same.l2) == ("", 0.0)
    assert compare_results(Cache(x), Cache(2 * x)).l2 == pytest.approx(0.5)
    assert compare_results(Cache(x), Cache(x, "static")).mismatch == "'dynamic' instead of 'static'"
    assert compare_results(Cache(x, inner=[Cache(x)]), Cache(x, inner=[Cache(x[:2])])).mismatch.startswith("shape")
    assert compare_results(Cache(x), object()).mismatch
    endless, other = Cache(x), Cache(x)
    endless.inner, other.inner = endless, other
    assert compare_results(endless, other).mismatch
