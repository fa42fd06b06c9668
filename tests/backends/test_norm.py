"""norm against Python's math. R rows, E experts, D width."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from moec.ir import BatchNorm, Norm
from tests.backends import oracle_rows
from tests.backends.oracle_numbers import Sum, check_sum, listed, matrix
from tests.backends.oracle_routing import group
from tests.backends.running import evaluate_one
from tests.backends.shapes import Routing, each_float, each_routing, some, strided

NAN = float("nan")
KINDS = [{"kind": "rms", "eps": 1e-6}, {"kind": "layer", "eps": 1e-5}]
each_kind = pytest.mark.parametrize("at", KINDS, ids=lambda at: at["kind"])
NONE = {"kind": "none", "eps": 0.0}


def _check(found: torch.Tensor, expected: list[list[float]]) -> None:
    for r, (row, wanted) in enumerate(zip(matrix(found), expected, strict=True)):
        size = max([abs(number) for number in wanted], default=0.0)
        for number, exact in zip(row, wanted, strict=True):
            check_sum(number, Sum(exact, size, 16), found.dtype, f"[{r}]")


@each_float
@each_kind
@pytest.mark.parametrize("parts", ["none", "w", "w+1", "wb", "b", "f32"])
def test_norm(dtype: torch.dtype, at: dict[str, Any], parts: str) -> None:
    x = some(5, 9, dtype=dtype, scale=4.0) + 3
    x[2] = 0
    kind = torch.float32 if parts == "f32" else dtype
    w = some(9, dtype=kind) if "w" in parts or parts == "f32" else None
    b = some(9, dtype=kind) if "b" in parts or parts == "f32" else None
    shift = 1.0 if parts == "w+1" else 0.0
    expected = [
        oracle_rows.norm(
            row, None if w is None else listed(w), None if b is None else listed(b), at["kind"], at["eps"], shift
        )
        for row in matrix(x)
    ]
    for same in (x, *strided(x)):
        found = evaluate_one(Norm, {"x": same, "w": w, "b": b}, w_shift=shift, **at)
        assert found.dtype == dtype
        _check(found, expected)


@each_float
@pytest.mark.parametrize("parts", ["w", "w+1", "wb", "b"])
def test_scale_and_shift_alone(dtype: torch.dtype, parts: str) -> None:
    test_norm(dtype, NONE, parts)


@each_routing
@pytest.mark.parametrize("at", [*KINDS, NONE], ids=lambda at: at["kind"])
def test_norm_of_each_expert(routing: Routing, at: dict[str, Any]) -> None:
    order, offsets = group(routing.ids.tolist(), routing.experts)
    x, w, b = some(len(order), 6), some(routing.experts, 6), some(routing.experts, 6)
    x[offsets[-1] :] = NAN
    expected = [[0.0] * 6 for _ in order]
    for e in range(routing.experts):
        if offsets[e] == offsets[e + 1]:
            w[e] = b[e] = NAN
        for r in range(offsets[e], offsets[e + 1]):
            expected[r] = oracle_rows.norm(matrix(x)[r], matrix(w)[e], matrix(b)[e], at["kind"], at["eps"], 0.0)
    bounds = torch.tensor(offsets, dtype=torch.int32)
    _check(evaluate_one(Norm, {"x": x, "offsets": bounds, "w": w, "b": b}, **at), expected)


def test_norm_of_many_sizes_and_of_tiny_rows() -> None:
    x = some(2, 3, 4)
    found = evaluate_one(Norm, {"x": x}, kind="rms", eps=1e-6)
    _check(found.view(6, 4), [oracle_rows.norm(row, None, None, "rms", 1e-6, 0.0) for row in matrix(x.view(6, 4))])
    tiny = torch.full((1, 4), 1e-4, dtype=torch.float16)
    _check(
        evaluate_one(Norm, {"x": tiny}, kind="rms", eps=0.0),
        [oracle_rows.norm(matrix(tiny)[0], None, None, "rms", 0.0, 0.0)],
    )


def test_norm_keeps_bad_numbers_in_their_row() -> None:
    x = some(3, 4)
    x[1, 0] = NAN
    found = evaluate_one(Norm, {"x": x}, kind="layer", eps=1e-5)
    assert found.isnan().any(1).tolist() == [False, True, False]


@each_routing
@pytest.mark.parametrize("parts", ["", "wb", "b"])
def test_batch_norm(routing: Routing, parts: str) -> None:
    order, offsets = group(routing.ids.tolist(), routing.experts)
    x = some(len(order), 6)
    x[offsets[-1] :] = NAN
    mean, var, w, b = (some(routing.experts, 6) for _ in range(4))
    var = var.square()
    more = {"w": w, "b": b}
    expected = [[0.0] * 6 for _ in order]
    for e in range(routing.experts):
        if offsets[e] == offsets[e + 1]:
            mean[e] = var[e] = w[e] = b[e] = NAN
        for r in range(offsets[e], offsets[e + 1]):
            for d in range(6):
                y = (float(x[r, d]) - float(mean[e, d])) / math.sqrt(float(var[e, d]) + 1e-3)
                y *= float(w[e, d]) if "w" in parts else 1.0
                expected[r][d] = y + (float(b[e, d]) if "b" in parts else 0.0)
    given = {"x": x, "offsets": torch.tensor(offsets, dtype=torch.int32), "mean": mean, "var": var}
    _check(evaluate_one(BatchNorm, {**given, **{name: more[name] for name in parts}}, eps=1e-3), expected)


@each_float
def test_batch_norm_is_rounded_once(dtype: torch.dtype) -> None:
    x, mean, w = some(3, 4, dtype=dtype), some(2, 4), some(2, 4, dtype=dtype)
    var = torch.full((2, 4), 0.25)
    found = evaluate_one(
        BatchNorm, {"x": x, "offsets": torch.tensor([0, 2, 3]), "mean": mean, "var": var, "w": w}, eps=0.0
    )
    each = torch.tensor([0, 0, 1])
    exact = (x.double() - mean.double()[each]) * 2 * w.double()[each]
    assert found.dtype == dtype
    _check(found, exact.tolist())
