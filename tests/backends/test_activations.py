"""act and glu against Python's math, with every attribute. F width."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from moec.ir import FUNCTIONS, FUSED_LAYOUTS, Act, Glu
from tests.backends import oracle_activations
from tests.backends.oracle_numbers import Sum, check_close, check_sum, listed, matrix
from tests.backends.running import evaluate_one
from tests.backends.shapes import each_float, some, strided

NAN, INF = float("nan"), float("inf")
LIMITS: list[dict[str, Any]] = [{}, {"limit": 1.5}, {"limit": 0.75, "clamp_after": True}]
CASES = [{"fn": fn, **limit} for fn, limit in itertools.product(FUNCTIONS, LIMITS)]
CASES += [{"fn": "silu", "alpha": 1.702, **limit} for limit in LIMITS]
each_case = pytest.mark.parametrize("at", CASES, ids=lambda at: "-".join(map(str, at.values())))


@each_case
@each_float
def test_act(at: dict[str, Any], dtype: torch.dtype) -> None:
    x = torch.cat([some(40, dtype=dtype, scale=3.0), torch.tensor([0.0, -0.0, 1e-6, -1e-6, 30.0, -30.0], dtype=dtype)])
    found = evaluate_one(Act, {"x": x}, **at)
    assert found.dtype == dtype
    for number, given in zip(listed(found), listed(x), strict=True):
        exact = oracle_activations.act(given, at)
        check_sum(number, Sum(exact, _size(str(at["fn"]), given, exact), 24), dtype, f"{at['fn']}({given})")


@each_case
def test_act_of_numbers_beyond(at: dict[str, Any]) -> None:
    x = torch.tensor([NAN, 1.0, NAN])
    found = evaluate_one(Act, {"x": x}, **at)
    assert found[[0, 2]].isnan().all()
    assert found[1].isfinite()
    large = evaluate_one(Act, {"x": torch.tensor([1e4, -1e4])}, **at)
    assert large.isfinite().all()


def test_softplus_has_no_threshold() -> None:
    """log(1 + e^x) is above x as long as f64 can tell."""
    x = torch.tensor([21.0, 25.0, 30.0], dtype=torch.float64)
    found = evaluate_one(Act, {"x": x}, fn="softplus")
    check_close(found, [oracle_activations.softplus(number) for number in listed(x)], steps=4)
    assert (found > x).all()


def _size(fn: str, x: float, y: float) -> float:
    """What errors of fn(x) = y are small against: below 0, gelu is x times the difference of close numbers."""
    return max(abs(y), abs(x)) if "gelu" in fn else abs(y)


def up_size(up: float, at: dict[str, Any]) -> float:
    """up as it is multiplied, its clamp and shift included."""
    return oracle_activations.glu(1.0, up, {**at, "fn": "identity", "limit": at.get("limit"), "alpha": 1.0})


GATES = [{"fn": fn, **more} for fn in ("silu", "gelu", "relu2", "identity") for more in LIMITS]
GATES += [{"fn": "silu", "alpha": 1.702, "limit": 1.5, "up_shift": 1.0}, {"fn": "sigmoid", "up_shift": -0.5}]


@each_float
@pytest.mark.parametrize("at", GATES, ids=lambda at: "-".join(map(str, at.values())))
@pytest.mark.parametrize("layout", ["pair", *FUSED_LAYOUTS])
def test_glu(dtype: torch.dtype, at: dict[str, Any], layout: str) -> None:
    both = some(5, 14, dtype=dtype, scale=2.0)
    if layout == "pair":
        gate, up = both[:, :7], both[:, 7:]
        found = [evaluate_one(Glu, {"gate": gate, "up": up}, **at)]
        wanted = [list(zip(g, u, strict=True)) for g, u in zip(matrix(gate), matrix(up), strict=True)]
    else:
        found = [evaluate_one(Glu, {"gate": same}, layout=layout, **at) for same in (both, *strided(both))]
        wanted = [oracle_activations.pairs(row, layout) for row in matrix(both)]
    for result in found:
        assert (result.dtype, result.shape) == (dtype, (5, 7))
        for row, pairs in zip(matrix(result), wanted, strict=True):
            for number, (g, u) in zip(row, pairs, strict=True):
                exact = oracle_activations.glu(g, u, at)
                size = abs(up_size(u, at)) * _size(str(at["fn"]), g, 0.0)
                check_sum(number, Sum(exact, max(abs(exact), size), 24), dtype, f"glu({g}, {u})")


def test_glu_rounds_once() -> None:
    """A shifted up that is no bf16 is not rounded to one."""
    gate = torch.tensor([[3.0]], dtype=torch.bfloat16)
    up = torch.tensor([[2.0**-8]], dtype=torch.bfloat16)
    found = evaluate_one(Glu, {"gate": gate, "up": up}, fn="relu", up_shift=1.0)
    # 3 * (1 + 2^-8) = 3.01171875 lies between 3.0 and 3.015625 and nearer to the second.
    assert found.item() == 3.015625


def test_glu_clamps_the_gate_from_above_only_and_up_on_both_sides() -> None:
    gate = torch.tensor([[9.0, -9.0, 9.0, 1.0]])
    up = torch.tensor([[9.0, -9.0, 1.0, -9.0]])
    found = evaluate_one(Glu, {"gate": gate, "up": up}, fn="identity", limit=2.0)
    assert found.tolist() == [[4.0, 18.0, 2.0, -2.0]]
    after = evaluate_one(Glu, {"gate": gate, "up": up}, fn="relu2", limit=2.0, clamp_after=True)
    assert after.tolist() == [[4.0, -0.0, 2.0, -2.0]]


def test_glu_keeps_bad_numbers_where_they_are() -> None:
    gate, up = torch.ones(2, 3), torch.ones(2, 3)
    gate[0, 1], up[1, 2] = NAN, NAN
    for more in LIMITS:
        found = evaluate_one(Glu, {"gate": gate, "up": up}, fn="silu", **more)
        assert found.isnan().tolist() == [[False, True, False], [False, False, True]]
