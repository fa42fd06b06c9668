"""route and route_experts against a walk over tokens. T tokens, E experts, C places of an expert."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moec.ir import Dim, Route, RouteExperts
from tests.backends.oracle_numbers import Sum, check_sum, listed, matrix
from tests.backends.oracle_routing import route_experts, route_token
from tests.backends.running import evaluate
from tests.backends.shapes import each_float, some, strided

NAN, INF = float("nan"), float("inf")
SCORES = ("softmax", "softmax_chosen", "sigmoid", "sqrt_softplus", "identity")
CASES: list[dict[str, Any]] = [
    *({"k": 2, "score": score} for score in SCORES),
    *({"k": 3, "score": score, "bias": True} for score in SCORES),
    {"k": 2, "bias": True, "bias_on": "logits"},
    {"k": 2, "score": "softmax_chosen", "bias": True, "bias_on": "logits"},
    {"k": 8, "score": "sigmoid", "normalize": "sum", "eps": 1e-2, "scale": 2.5},
    {"k": 1, "normalize": "clamped_sum", "eps": 0.5},
    {"k": 4, "score": "identity", "normalize": "norm", "p": 2.0},
    {"k": 2, "score": "sigmoid", "groups": 4, "kept_groups": 2, "group_score": "top2", "bias": True},
    {"k": 3, "score": "sigmoid", "groups": 4, "kept_groups": 1, "group_fill": "zero", "bias": True},
    {"k": 2, "groups": 2, "kept_groups": 1, "group_score": "max"},
    {"k": 1, "score": "sigmoid", "groups": 8, "kept_groups": 3, "group_score": "top2"},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_route(case: dict[str, Any], tokens: int) -> None:
    at = {name: value for name, value in case.items() if name != "bias"}
    logits = some(tokens, 8, scale=2.0)
    bias = some(8, scale=0.3) if "bias" in case else None
    expected = [route_token(row, None if bias is None else listed(bias), **at) for row in matrix(logits)]
    for same in (logits, *strided(logits)):
        weights, experts = evaluate(Route, {"logits": same, "bias": bias}, **at)
        assert (weights.dtype, experts.dtype) == (torch.float32, torch.int32)
        assert experts.tolist() == [chosen for _, chosen in expected]
        for row, (wanted, _) in zip(matrix(weights), expected, strict=True):
            for number, exact in zip(row, wanted, strict=True):
                check_sum(number, Sum(exact, max(map(abs, wanted)), 24), torch.float32, "weight")


@each_float
def test_route_computes_in_fp32(dtype: torch.dtype) -> None:
    logits = some(5, 8, dtype=dtype)
    low = evaluate(Route, {"logits": logits}, k=3)
    high = evaluate(Route, {"logits": logits.float()}, k=3)
    assert all(torch.equal(a, b) for a, b in zip(low, high, strict=True))


def test_route_adds_noise_before_anything_else() -> None:
    logits, noise = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[5.0, 0.0, 0.0]])
    weights, experts = evaluate(Route, {"logits": logits, "noise": noise}, k=2, score="identity")
    assert (experts.tolist(), weights.tolist()) == ([[0, 2]], [[5.0, 2.0]])


def test_equals_go_to_the_lower_expert_and_part() -> None:
    logits = torch.zeros(70, 64)
    _, experts = evaluate(Route, {"logits": logits}, k=6, score="identity")
    assert experts.tolist() == [[0, 1, 2, 3, 4, 5]] * 70
    minus = torch.tensor([[-0.0, 0.0, -0.0, 0.0]])
    _, experts = evaluate(Route, {"logits": minus}, k=4, score="identity")
    assert experts.tolist() == [[0, 1, 2, 3]]
    at: dict[str, Any] = {"k": 4, "score": "identity", "groups": 4, "kept_groups": 2}
    _, experts = evaluate(Route, {"logits": torch.ones(3, 8)}, **at)
    assert experts.tolist() == [[0, 1, 2, 3]] * 3


def test_a_bad_token_does_not_disturb_others() -> None:
    logits = some(4, 6)
    clean = evaluate(Route, {"logits": logits}, k=2)
    logits[2] = NAN
    found = evaluate(Route, {"logits": logits}, k=2)
    for a, b in zip(found, clean, strict=True):
        assert torch.equal(a[[0, 1, 3]], b[[0, 1, 3]])
    assert found[0][2].isnan().all()
    assert ((found[1] >= 0) & (found[1] < 6)).all()


@pytest.mark.parametrize("kind", ["softmax", "softmax_tokens", "sigmoid", "identity"])
@pytest.mark.parametrize(("tokens", "capacity"), [(6, 2), (6, 6), (3, 5), (1, 1), (0, 2)])
def test_route_experts(kind: str, tokens: int, capacity: int) -> None:
    logits = some(tokens, 4, scale=2.0)
    weights, chosen = evaluate(RouteExperts, {"logits": logits}, capacity=Dim.of(capacity), score=kind)
    assert (weights.dtype, chosen.dtype) == (torch.float32, torch.int32)
    assert weights.shape == chosen.shape == (4, capacity)
    if tokens == 0:
        assert (chosen == -1).all()
        assert not weights.any()
        return
    wanted, places = route_experts(matrix(logits), capacity, kind)
    assert chosen.tolist() == places
    for number, exact in zip(listed(weights), [w for row in wanted for w in row], strict=True):
        check_sum(number, Sum(exact, abs(exact), 16), torch.float32, "weight")


def test_route_experts_gives_equals_to_the_lower_token() -> None:
    _, chosen = evaluate(RouteExperts, {"logits": torch.zeros(100, 2)}, capacity=Dim.of(3), score="sigmoid")
    assert chosen.tolist() == [[0, 1, 2], [0, 1, 2]]
