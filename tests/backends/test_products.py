"""linear, grouped_linear, quantize_rows and quantize_weight against products of Python numbers."""

from __future__ import annotations

import math

import pytest
import torch

from moec.ir import GroupedLinear, Linear, QuantizeRows, QuantizeWeight
from tests.backends import oracle_rows
from tests.backends.oracle_numbers import Sum, check_sums, ints, listed, matrix, same_bits
from tests.backends.oracle_routing import group
from tests.backends.running import DTYPES, FLOATS, evaluate, evaluate_one
from tests.backends.shapes import Routing, each_float, each_routing, some, strided

NAN, INF = float("nan"), float("inf")


@each_float
@pytest.mark.parametrize("shape", [(0, 5, 3), (1, 1, 1), (4, 7, 5), (2, 33, 9)])
@pytest.mark.parametrize("biased", ["none", "own", "f32"])
def test_linear_is_a_product_rounded_once(dtype: torch.dtype, shape: tuple[int, int, int], biased: str) -> None:
    tokens, inputs, outputs = shape
    x, w = some(tokens, inputs, dtype=dtype), some(outputs, inputs, dtype=dtype)
    b = None if biased == "none" else some(outputs, dtype=dtype if biased == "own" else torch.float32)
    expected = [oracle_rows.product(row, matrix(w), None if b is None else listed(b)) for row in matrix(x)]
    for same in (x, *strided(x)):
        for weight in (w, *strided(w)):
            found = evaluate_one(Linear, {"x": same, "w": weight, "b": b})
            assert found.dtype == dtype
            check_sums(found, expected)


def test_linear_rounds_after_the_bias() -> None:
    """257 is no bf16: a product rounded before its bias would give 256 + 1."""
    x = torch.tensor([[256.0, 1.0]], dtype=torch.bfloat16)
    w = torch.ones(1, 2, dtype=torch.bfloat16)
    found = evaluate_one(Linear, {"x": x, "w": w, "b": torch.ones(1, dtype=torch.bfloat16)})
    assert found.item() == 258.0
    fine = evaluate_one(Linear, {"x": x, "w": w, "b": torch.tensor([1.0 + 2.0**-9])})
    assert fine.item() == 258.0


@pytest.mark.parametrize("given", FLOATS)
@pytest.mark.parametrize("wanted", FLOATS)
def test_linear_gives_the_type_asked_for(given: str, wanted: str) -> None:
    x, w = some(3, 9, dtype=DTYPES[given]), some(4, 9, dtype=DTYPES[given])
    found = evaluate_one(Linear, {"x": x, "w": w}, dtype=wanted)
    assert found.dtype == DTYPES[wanted]
    exact = [oracle_rows.product(row, matrix(w)) for row in matrix(x)]
    # Sums are kept in f64 only where x holds it; elsewhere fp32 is promised.
    if wanted == "f64" and given != "f64":
        found = found.float()
    check_sums(found, exact)


def test_linear_on_any_rank() -> None:
    x, w = some(2, 3, 4, 6), some(5, 6)
    found = evaluate_one(Linear, {"x": x, "w": w})
    assert found.shape == (2, 3, 4, 5)
    check_sums(found.view(24, 5), [oracle_rows.product(row, matrix(w)) for row in matrix(x.view(24, 6))])
    one = evaluate_one(Linear, {"x": x[0, 0, 0], "w": w})
    assert one.shape == (5,)


def test_half_products_do_not_overflow_between() -> None:
    """The sum passes 65504, the largest f16, on the way to 1."""
    x = torch.tensor([[200.0, 200.0, 1.0]], dtype=torch.float16)
    w = torch.tensor([[400.0, -400.0, 1.0]], dtype=torch.float16)
    assert evaluate_one(Linear, {"x": x, "w": w}).item() == 1.0


def test_bad_numbers_stay_in_their_row() -> None:
    x, w = some(5, 8), some(6, 8)
    clean = evaluate_one(Linear, {"x": x, "w": w})
    x[1], x[3, 2] = NAN, INF
    found = evaluate_one(Linear, {"x": x, "w": w})
    assert found[1].isnan().all()
    assert not found[3].isfinite().any()
    assert same_bits(found[[0, 2, 4]], clean[[0, 2, 4]])


@each_routing
@each_float
@pytest.mark.parametrize("biased", [False, True])
def test_grouped_linear_uses_each_experts_own_matrix(routing: Routing, dtype: torch.dtype, biased: bool) -> None:
    order, offsets = group(routing.ids.tolist(), routing.experts)
    rows, w = some(len(order), 7, dtype=dtype), some(routing.experts, 3, 7, dtype=dtype)
    b = some(routing.experts, 3, dtype=dtype) if biased else None
    # An expert without rows is not touched, and rows of no expert are not looked at.
    for e in range(routing.experts):
        if offsets[e] == offsets[e + 1]:
            w[e] = NAN
    rows[offsets[-1] :] = NAN
    bounds = torch.tensor(offsets, dtype=torch.int32)
    found = evaluate_one(GroupedLinear, {"rows": rows, "offsets": bounds, "w": w, "b": b})
    assert found.dtype == dtype
    expected = oracle_rows.grouped(matrix(rows), offsets, w.double().tolist(), None if b is None else matrix(b))
    check_sums(found, expected)
    turned = w.transpose(1, 2).contiguous().transpose(1, 2)
    check_sums(evaluate_one(GroupedLinear, {"rows": rows, "offsets": bounds, "w": turned, "b": b}), expected)
    for same in strided(rows):
        check_sums(evaluate_one(GroupedLinear, {"rows": same, "offsets": bounds.long(), "w": w, "b": b}), expected)


@each_float
def test_int8_weights_count_as_their_scaled_values(dtype: torch.dtype) -> None:
    x = some(4, 10, dtype=dtype)
    w = torch.randint(-127, 128, (3, 10), dtype=torch.int8)
    scale = torch.tensor([0.01, 2.0, 3.0e-5])
    b = some(3)
    found = evaluate_one(Linear, {"x": x, "w": w, "scale": scale, "b": b})
    assert found.dtype == dtype
    real = [[q * s for q in row] for row, s in zip(matrix(w), listed(scale), strict=True)]
    check_sums(found, [oracle_rows.product(row, real, listed(b)) for row in matrix(x)])
    offsets = torch.tensor([0, 1, 1, 3])
    bank, scales = w.repeat(3, 1, 1), torch.stack([scale, scale * NAN, scale * 2])
    found = evaluate_one(GroupedLinear, {"rows": x, "offsets": offsets, "w": bank, "scale": scales})
    expected = [oracle_rows.product(row, real) for row in matrix(x)[:1]]
    expected += [oracle_rows.product(row, [[2 * q for q in out] for out in real]) for row in matrix(x)[1:3]]
    check_sums(found, [*expected, [Sum(0.0, 0.0, 0)] * 3])


def test_int8_weights_of_huge_and_tiny_scale() -> None:
    """x times q alone would overflow fp32; x times q * scale does not."""
    x = torch.full((1, 200), 1.0e36)
    w = torch.full((1, 200), 127, dtype=torch.int8)
    found = evaluate_one(Linear, {"x": x, "w": w, "scale": torch.tensor([1.0e-3])})
    assert found.item() == pytest.approx(1.0e36 * 127 * 1.0e-3 * 200, rel=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 5])
@pytest.mark.parametrize("wanted", FLOATS)
def test_int8_rows_and_weights(groups: int, wanted: str) -> None:
    x = torch.randint(-127, 128, (4, 10), dtype=torch.int8)
    x_scale = some(4, groups).abs()
    w = torch.randint(-127, 128, (3, 10), dtype=torch.int8)
    scale, b = some(3).abs(), some(3)
    at = {"x": x, "w": w, "scale": scale, "x_scale": x_scale, "b": b}
    found = evaluate_one(Linear, at, dtype=wanted)
    assert found.dtype == DTYPES[wanted]
    size = 10 // groups
    factors = matrix(x_scale)
    real_x = [[q * factors[t][c // size] for c, q in enumerate(row)] for t, row in enumerate(matrix(x))]
    real_w = [[q * s for q in row] for row, s in zip(matrix(w), listed(scale), strict=True)]
    exact = [oracle_rows.product(row, real_w, listed(b)) for row in real_x]
    check_sums(found.float() if wanted == "f64" else found, exact)
    offsets = torch.tensor([0, 3, 4])
    bank = {"w": torch.stack([w, -w]), "scale": torch.stack([scale, scale])}
    found = evaluate_one(GroupedLinear, {"rows": x, "offsets": offsets, "x_scale": x_scale, **bank}, dtype="f32")
    plain = [oracle_rows.product(row, real_w) for row in real_x]
    minus = [Sum(-s.value, s.size, s.steps) for s in plain[3]]
    check_sums(found, [*plain[:3], minus])


def test_int8_products_are_exact_in_a_group() -> None:
    """Their sum passes 2^24, where fp32 would lose the last 1."""
    x = torch.full((1, 2049), 127, dtype=torch.int8)
    w = torch.full((1, 2049), 127, dtype=torch.int8)
    x[0, -1], w[0, -1] = 1, 1
    at = {"x": x, "w": w, "scale": torch.ones(1), "x_scale": torch.ones(1, 1)}
    exact = 2048 * 127 * 127 + 1
    assert evaluate_one(Linear, {**at, "b": torch.tensor([-float(2048 * 127 * 127)])}, dtype="f32").item() in (0.0, 1.0)
    assert evaluate_one(Linear, at, dtype="f32").item() == torch.tensor(exact).float().item()


@each_float
@pytest.mark.parametrize("groups", [1, 3])
def test_quantize_rows(dtype: torch.dtype, groups: int) -> None:
    x = some(6, 9, dtype=dtype)
    x[1] = 0
    x[2] = 1.0e-3 if dtype == torch.float16 else 1.0e-30
    q, scale = evaluate(QuantizeRows, {"x": x}, groups=groups)
    assert (q.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (6, groups))
    _check_quantized(x.reshape(6 * groups, -1), q.reshape(6 * groups, -1), scale.flatten())


def _check_quantized(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor) -> None:
    """The scale is max / 127, q the nearest whole number: a rounded scale may move what lies in the middle."""
    for row, whole, factor in zip(matrix(x.float()), q.tolist(), listed(scale), strict=True):
        wanted, exact = oracle_rows.quantized(row)
        assert factor == pytest.approx(exact, rel=2**-23)
        for number, found, expected in zip(row, whole, wanted, strict=True):
            assert abs(found) <= 127
            place = number / factor
            assert found == expected or abs(abs(place - math.floor(place)) - 0.5) < 1e-4


def test_quantize_rounds_half_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5]])
    q, scale = evaluate(QuantizeRows, {"x": x})
    assert (ints(q), scale.item()) == ([127, 0, 2, 2, 0, -2, -126], 1.0)
    q, scale = evaluate(QuantizeWeight, {"w": x})
    assert (ints(q), scale.item()) == ([127, 0, 2, 2, 0, -2, -126], 1.0)


@each_float
def test_quantize_weight(dtype: torch.dtype) -> None:
    w = some(3, 4, 11, dtype=dtype)
    w[1, 2] = 0
    for same in (w, w.transpose(1, 2).contiguous().transpose(1, 2)):
        q, scale = evaluate(QuantizeWeight, {"w": same})
        assert (q.dtype, scale.dtype, q.shape, scale.shape) == (torch.int8, torch.float32, (3, 4, 11), (3, 4))
        assert scale[1, 2] == 1
        _check_quantized(w.flatten(0, 1), q.flatten(0, 1), scale.flatten())
    q, scale = evaluate(QuantizeWeight, {"w": w[0]})
    _check_quantized(w[0], q, scale)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_quantized_rows_with_bad_numbers_stay_bad(bad: float) -> None:
    """A row that holds a not-a-number or an infinity gives one again, and its neighbours do not notice."""
    x = some(3, 4)
    x[1, 2] = bad
    q, scale = evaluate(QuantizeRows, {"x": x})
    w = torch.randint(1, 100, (5, 4), dtype=torch.int8)
    y = evaluate_one(Linear, {"x": q, "w": w, "scale": torch.ones(5), "x_scale": scale}, dtype="f32")
    assert not y[1].isfinite().any()
    assert y[[0, 2]].isfinite().all()
