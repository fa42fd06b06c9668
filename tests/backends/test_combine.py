"""combine, scale_rows, identity_rows and the dense forms against sums over Python numbers."""

from __future__ import annotations

import pytest
import torch

from moec.ir import Combine, CombineDense, Dim, DispatchDense, IdentityRows, KeptWeights, ScaleRows
from tests.backends import oracle_rows
from tests.backends.oracle_numbers import Sum, check_sums, ints, listed, matrix, same_bits
from tests.backends.oracle_routing import group, softmax
from tests.backends.running import evaluate, evaluate_one
from tests.backends.shapes import Routing, each_float, each_routing, some, strided

NAN, INF = float("nan"), float("inf")


def _order(routing: Routing) -> torch.Tensor:
    return torch.tensor(group(routing.ids.tolist(), routing.experts)[0], dtype=torch.int32)


@each_routing
@each_float
def test_combine_sums_the_slots_of_a_token(routing: Routing, dtype: torch.dtype) -> None:
    order = _order(routing)
    weights = some(*routing.ids.shape, scale=3.0)
    rows = some(order.numel(), 5, dtype=dtype)
    rows[order < 0] = NAN
    for same in (rows, *strided(rows)):
        found = evaluate_one(Combine, {"rows": same, "order": order, "weights": weights})
        assert found.dtype == dtype
        check_sums(found, oracle_rows.combine(matrix(rows), ints(order), matrix(weights), 5))


def test_combine_rounds_once() -> None:
    """257 is no bf16: rounding the products or the partial sums would lose the last 1."""
    rows = torch.tensor([[1.0], [1.0], [1.0]], dtype=torch.bfloat16)
    weights = torch.tensor([[256.0, 1.0, 1.0]])
    found = evaluate_one(Combine, {"rows": rows, "order": torch.tensor([0, 1, 2]), "weights": weights})
    assert found.item() == 258.0
    # A weight is not rounded to the rows' type either.
    fine = torch.tensor([[1.0 + 2.0**-9, 2.0**-9, 2.0**-8]])
    found = evaluate_one(Combine, {"rows": rows, "order": torch.tensor([0, 1, 2]), "weights": fine})
    assert found.item() == 1.0 + 2.0**-6 / 2


def test_combine_adds_in_the_order_of_choices() -> None:
    """In fp32 2^24 + 1 + 1 is 2^24, but 1 + 1 + 2^24 is 2^24 + 2."""
    big = 2.0**24
    rows = torch.tensor([[1.0], [1.0], [big]])
    ones = torch.ones(1, 3)
    for slots, expected in (([0, 1, 2], big + 2), ([2, 1, 0], big), ([1, 2, 0], big)):
        order = torch.tensor(slots)
        found = evaluate_one(Combine, {"rows": rows, "order": order, "weights": ones})
        by_slot = [rows[slots.index(j), 0].item() for j in range(3)]
        assert found.item() == expected, by_slot


def test_combine_ignores_what_was_dropped() -> None:
    """A dropped slot adds nothing, whatever its weight and the row that stands for it hold."""
    rows = torch.tensor([[2.0], [NAN], [INF]])
    order = torch.tensor([0, -1, -1])
    weights = torch.tensor([[3.0, NAN, INF]])
    found = evaluate_one(Combine, {"rows": rows, "order": order, "weights": weights})
    assert found.item() == 6.0
    none = evaluate_one(Combine, {"rows": rows, "order": torch.full((3,), -1), "weights": weights})
    assert none.item() == 0.0


def test_combine_keeps_bad_numbers_in_their_token() -> None:
    rows = some(6, 4)
    rows[2] = NAN
    weights = some(3, 2)
    weights[0, 0] = INF
    order = torch.tensor([4, 0, 2, 5, 1, 3])
    found = evaluate_one(Combine, {"rows": rows, "order": order, "weights": weights})
    assert found[1].isnan().all()
    assert not found[0].isfinite().any()
    assert found[2].isfinite().all()


@each_float
def test_combine_by_expert_sums_ascending_rows(dtype: torch.dtype) -> None:
    order = torch.tensor([3, 0, -1, 3, 1, 3, 0, -1], dtype=torch.int32)
    rows = some(8, 3, dtype=dtype)
    rows[order < 0] = NAN
    weights = some(2, 4)
    at = {"rows": rows, "order": order, "weights": weights}
    found = evaluate_one(Combine, at, by="expert", tokens=Dim.of(5))
    check_sums(found, oracle_rows.combine_chosen(matrix(rows), ints(order), listed(weights), 5, 3))
    assert not found[[2, 4]].any()


def test_combine_by_expert_adds_in_the_order_of_rows() -> None:
    rows = torch.tensor([[1.0], [1.0], [2.0**24]])
    at = {"order": torch.tensor([0, 0, 0]), "weights": torch.ones(3, 1)}
    up = evaluate_one(Combine, {"rows": rows, **at}, by="expert", tokens=Dim.of(1))
    down = evaluate_one(Combine, {"rows": rows.flip(0), **at}, by="expert", tokens=Dim.of(1))
    assert (up.item(), down.item()) == (2.0**24 + 2, 2.0**24)


def test_combine_of_f64_weights_sums_in_f64() -> None:
    rows = torch.tensor([[1.0], [1.0]])
    weights = torch.tensor([[1.0, 2.0**-40]], dtype=torch.float64) * 2.0**20
    minus = torch.tensor([[-(2.0**20), 0.0]], dtype=torch.float64)
    found = evaluate_one(Combine, {"rows": rows, "order": torch.tensor([0, 1]), "weights": weights})
    assert found.dtype == torch.float32
    both = torch.cat([weights, minus], 1)
    four = torch.ones(4, 1)
    found = evaluate_one(Combine, {"rows": four, "order": torch.arange(4), "weights": both})
    assert found.item() == 2.0**-20


@each_routing
@each_float
def test_scale_rows_rounds_the_weight_first(routing: Routing, dtype: torch.dtype) -> None:
    order = _order(routing)
    weights = some(*routing.ids.shape)
    rows = some(order.numel(), 3, dtype=dtype)
    rows[order < 0] = NAN
    found = evaluate_one(ScaleRows, {"rows": rows, "order": order, "weights": weights})
    flat = weights.flatten().to(dtype)
    for r, slot in enumerate(ints(order)):
        expected = rows[r] * flat[slot] if slot >= 0 else torch.zeros(3, dtype=dtype)
        assert same_bits(found[r], expected)


def test_scale_rows_by_expert() -> None:
    order = torch.tensor([5, -1, 0, 2], dtype=torch.int32)
    rows, weights = some(4, 3), some(2, 2)
    found = evaluate_one(ScaleRows, {"rows": rows, "order": order, "weights": weights}, by="expert")
    expected = rows * weights.flatten().unsqueeze(1)
    expected[1] = 0
    assert same_bits(found, expected)


@each_routing
@pytest.mark.parametrize(("normalize", "eps"), [("none", 0.0), ("sum", 0.0), ("sum", 0.5), ("clamped_sum", 0.25)])
def test_kept_weights_are_normalized_among_themselves(routing: Routing, normalize: str, eps: float) -> None:
    order = _order(routing)
    order[::2] = -1
    weights = some(*routing.ids.shape).abs()
    found = evaluate_one(KeptWeights, {"weights": weights, "order": order}, normalize=normalize, eps=eps)
    kept, k = set(ints(order)) - {-1}, routing.ids.shape[1]
    for t, row in enumerate(matrix(weights)):
        left = [w if t * k + j in kept else 0.0 for j, w in enumerate(row)]
        total = {"none": 1.0, "sum": sum(left) + eps, "clamped_sum": max(sum(left), eps)}[normalize]
        expected = [w / total if total else NAN for w in left]
        assert torch.allclose(found[t], torch.tensor(expected), rtol=1e-6, atol=0, equal_nan=True)


def test_dropped_weights_are_zero_whatever_they_hold() -> None:
    weights = torch.tensor([[NAN, 2.0], [INF, 3.0]])
    order = torch.tensor([1, 3, -1, -1])
    found = evaluate_one(KeptWeights, {"weights": weights, "order": order}, normalize="sum")
    assert found.tolist() == [[0.0, 1.0], [0.0, 1.0]]


@each_routing
@each_float
def test_identity_rows_add_the_token_itself(routing: Routing, dtype: torch.dtype) -> None:
    ids = routing.ids
    x = some(ids.shape[0], 3, dtype=dtype)
    weights = some(*ids.shape)
    weights[ids < 1] = NAN
    found = evaluate_one(IdentityRows, {"x": x, "ids": ids, "weights": weights}, first=1, count=2)
    expected = []
    for row, chosen, factors in zip(matrix(x), ids.tolist(), matrix(weights), strict=True):
        mine = [w for e, w in zip(chosen, factors, strict=True) if e in (1, 2)]
        expected.append([Sum.of([number * w for w in mine]) for number in row])
    weights_ok = [[s.value == s.value for s in row] for row in expected]
    assert all(all(row) for row in weights_ok)
    check_sums(found, expected)


@each_float
@pytest.mark.parametrize("softmaxed", [False, True])
@pytest.mark.parametrize("shape", [(5, 2, 3), (1, 1, 1), (7, 3, 1)])
def test_dense_dispatch_and_combine(dtype: torch.dtype, softmaxed: bool, shape: tuple[int, int, int]) -> None:
    tokens, experts, places = shape
    x = some(tokens, 4, dtype=dtype)
    weights = some(*shape, scale=2.0)
    rows, offsets = evaluate(DispatchDense, {"x": x, "weights": weights}, softmax=softmaxed)
    assert ints(offsets) == [e * places for e in range(experts + 1)]
    assert offsets.dtype == torch.int32
    flat = matrix(weights.flatten(1))
    columns = [list(column) for column in zip(*flat, strict=True)]
    mixed = [softmax(column) for column in columns] if softmaxed else columns
    values = matrix(x)
    check_sums(rows, [[_mix(column, [v[d] for v in values]) for d in range(4)] for column in mixed])

    back = evaluate_one(CombineDense, {"rows": rows, "weights": weights}, softmax=softmaxed)
    per_token = [softmax(row) for row in flat] if softmaxed else flat
    values = matrix(rows)
    check_sums(back, [[_mix(row, [v[d] for v in values]) for d in range(4)] for row in per_token])


def _mix(factors: list[float], numbers: list[float]) -> Sum:
    found = Sum.of([a * b for a, b in zip(factors, numbers, strict=True)])
    # The softmax itself takes some steps.
    return Sum(found.value, found.size, found.steps + 12)


def test_dense_dispatch_of_no_tokens() -> None:
    rows, _ = evaluate(DispatchDense, {"x": torch.zeros(0, 3), "weights": torch.zeros(0, 2, 2)})
    assert torch.equal(rows, torch.zeros(4, 3))
    back = evaluate_one(CombineDense, {"rows": some(4, 3), "weights": torch.zeros(0, 2, 2)}, softmax=True)
    assert back.shape == (0, 3)


def test_one_hot_dispatch_copies_tokens() -> None:
    x = some(3, 4, dtype=torch.bfloat16)
    mask = torch.zeros(3, 2, 2)
    mask[2, 0, 1] = mask[0, 1, 0] = 1
    rows, _ = evaluate(DispatchDense, {"x": x, "weights": mask})
    assert same_bits(rows[[1, 2]], x[[2, 0]])
    assert not rows[[0, 3]].any()
