"""group, gather, exchange against a walk over the slots. T tokens, K choices, E experts, R rows."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.ir import Dim, Exchange, Gather, Group, Tensor
from tests.backends import oracle_rows
from tests.backends.oracle_numbers import ints, matrix, same_bits
from tests.backends.oracle_routing import group, kept_slots
from tests.backends.running import DTYPES, evaluate, evaluate_one
from tests.backends.shapes import Routing, each_float, each_routing, some, strided

NAN, INF = float("nan"), float("inf")


@each_routing
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_group_sorts_slots_by_expert(routing: Routing, dtype: torch.dtype) -> None:
    order, offsets = evaluate(Group, {"ids": routing.ids.to(dtype)}, experts=routing.experts)
    assert (order.dtype, offsets.dtype) == (torch.int32, torch.int32)
    assert (ints(order), ints(offsets)) == group(routing.ids.tolist(), routing.experts)


def test_group_of_ids_with_strides() -> None:
    ids = torch.randint(0, 4, (6, 3), dtype=torch.int32)
    expected = evaluate(Group, {"ids": ids}, experts=4)
    for same in strided(ids):
        assert all(torch.equal(a, b) for a, b in zip(evaluate(Group, {"ids": same}, experts=4), expected, strict=True))


def test_group_by_expert_keeps_the_places() -> None:
    tokens = torch.tensor([[2, 0, -1], [1, -1, -1]], dtype=torch.int32)
    order, offsets = evaluate(Group, {"ids": tokens}, experts=2, by="expert")
    assert ints(order) == [2, 0, -1, 1, -1, -1]
    assert ints(offsets) == [0, 3, 6]


POLICIES = [
    dict(zip(("policy", "priority", "sequence"), case, strict=True))
    for case in itertools.product(("arrival", "weight", "token_weight"), ("token", "choice"), (None, 4, 5, 100))
]


def _capacity(
    ids: torch.Tensor,
    weights: torch.Tensor,
    experts: int,
    capacity: int,
    policy: str,
    priority: str,
    sequence: int | None,
) -> tuple[list[int], list[int]]:
    operands = {"ids": ids, "weights": None if policy == "arrival" else weights}
    order, offsets = evaluate(
        Group,
        operands,
        experts=experts,
        capacity=Dim.of(capacity),
        policy=policy,
        priority=priority,
        scope="batch" if sequence is None else "sequence",
        sequence=None if sequence is None else Dim.of(sequence),
    )
    return ints(order), ints(offsets)


@each_routing
@pytest.mark.parametrize("capacity", [1, 2, 5])
@pytest.mark.parametrize("at", POLICIES, ids=lambda at: "-".join(map(str, at.values())))
def test_capacity_keeps_the_first_by_priority_policy_and_arrival(routing: Routing, capacity: int, at: dict) -> None:  # type: ignore[type-arg]
    ids = routing.ids
    # Few different weights, so that there are ties; and numbers that sorts treat in odd ways.
    weights = torch.tensor([0.5, 0.25, 0.0, -0.0, NAN, INF, -INF, 0.5])[torch.randint(0, 8, ids.shape)]
    kept = kept_slots(ids.tolist(), routing.experts, capacity, weights=weights.tolist(), **at)
    assert _capacity(ids, weights, routing.experts, capacity, **at) == group(ids.tolist(), routing.experts, kept)


@given(
    ids=st.lists(st.tuples(st.integers(-1, 3), st.integers(-1, 3)), max_size=12),
    weights=st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0, NAN]), st.sampled_from([0.5, 2.0])), min_size=12),
    capacity=st.integers(1, 4),
    at=st.sampled_from(POLICIES),
)
def test_capacity_on_any_routing(
    ids: list[tuple[int, int]], weights: list[tuple[float, float]], capacity: int, at: dict[str, object]
) -> None:
    chosen = torch.tensor(ids, dtype=torch.int32).reshape(len(ids), 2)
    factors = weights[: len(ids)]
    kept = kept_slots(ids, 3, capacity, weights=factors, **at)  # type: ignore[arg-type]
    found = _capacity(chosen, torch.tensor(factors).reshape(len(ids), 2), 3, capacity, **at)  # type: ignore[arg-type]
    assert found == group(ids, 3, kept)


def test_capacity_of_the_call() -> None:
    """A size with letters is evaluated for the tokens of each call."""
    for tokens in (1, 4, 9):
        ids = torch.zeros(tokens, 1, dtype=torch.int32)
        order, offsets = evaluate(
            Group, {"ids": ids}, types={"ids": Tensor.of("i32", "T", 1)}, experts=2, capacity=Dim.parse("ceildiv(T, 2)")
        )
        kept = -(-tokens // 2)
        assert ints(offsets) == [0, kept, kept]
        assert ints(order) == list(range(kept)) + [-1] * (tokens - kept)


@each_routing
@each_float
def test_gather_copies_rows_and_fills_with_zeros(routing: Routing, dtype: torch.dtype) -> None:
    x = some(routing.ids.shape[0], 5, dtype=dtype)
    order, _ = group(routing.ids.tolist(), routing.experts)
    places = torch.tensor(order, dtype=torch.int32)
    k = routing.ids.shape[1]
    for same in (x, *strided(x)):
        rows = evaluate_one(Gather, {"x": same, "order": places}, k=k)
        assert rows.dtype == dtype
        assert matrix(rows) == oracle_rows.gather(matrix(x), order, k, 5)


def test_gather_of_places_without_a_token() -> None:
    """Not even token 0's not-a-numbers may show in them; nor need there be a token 0."""
    x = torch.full((1, 3), NAN)
    order = torch.tensor([-1, 0, -1], dtype=torch.int32)
    rows = evaluate_one(Gather, {"x": x, "order": order}, k=1)
    assert torch.equal(rows[[0, 2]], torch.zeros(2, 3))
    assert rows[1].isnan().all()
    none = evaluate_one(Gather, {"x": x[:0], "order": torch.tensor([-1, -1])}, k=1)
    assert torch.equal(none, torch.zeros(2, 3))


OWNERS = [(0, 1, 0, 1), (3, 2, 1, 0), (0, 0, 0, 0), (2, 2, 0, 0)]


@pytest.mark.parametrize("owners", OWNERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_exchange_orders_segments_by_device_and_back(owners: tuple[int, ...], dtype: torch.dtype) -> None:
    counts = [3, 0, 2, 4]
    offsets = torch.tensor([0, 3, 3, 5, 9], dtype=torch.int32)
    rows = torch.arange(11 * 2).view(11, 2).to(dtype)
    away, away_offsets = evaluate(Exchange, {"rows": rows, "offsets": offsets}, owners=owners, devices=4)
    device_order = sorted(range(4), key=lambda e: owners[e])
    segments = [rows[offsets[e] : offsets[e + 1]] for e in device_order]
    assert torch.equal(away, torch.cat([*segments, torch.zeros(2, 2, dtype=dtype)]))
    assert ints(away_offsets) == list(itertools.accumulate([counts[e] for e in device_order], initial=0))
    assert away_offsets.dtype == torch.int32
    home, home_offsets = evaluate(
        Exchange, {"rows": away, "offsets": away_offsets}, owners=owners, devices=4, back=True
    )
    assert same_bits(home[:9], rows[:9])
    assert not home[9:].any()
    assert torch.equal(home_offsets, offsets)


def test_exchange_of_nothing() -> None:
    offsets = torch.zeros(3, dtype=torch.int32)
    rows, found = evaluate(Exchange, {"rows": torch.zeros(0, 4), "offsets": offsets}, owners=(1, 0), devices=2)
    assert rows.shape == (0, 4)
    assert ints(found) == [0, 0, 0]


def test_exchange_keeps_the_type_of_offsets() -> None:
    offsets = torch.tensor([0, 1, 2])
    _, found = evaluate(Exchange, {"rows": some(2, 2), "offsets": offsets}, owners=(1, 0), devices=2)
    assert found.dtype == DTYPES["i64"]
