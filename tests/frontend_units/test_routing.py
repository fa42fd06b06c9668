"""Every form of routing becomes experts [T, K] and weights [T, K] with the same sum; calls outside it are unusual.

T tokens, K experts per token, E experts.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moec.frontends.torch.routing import FORMS, Unusual
from tests.frontend_units.build import rand

T, K, E = 6, 2, 4
INDEX = torch.tensor([[0, 2], [1, 2], [2, 3], [3, 0], [0, 1], [2, 1]])
WEIGHTS = rand(T, K).abs() + 0.1


def gates(experts: Tensor, weights: Tensor) -> Tensor:
    """[T, E]: what each expert is weighed with; index E is no expert."""
    table = torch.zeros(len(experts), E + 1)
    return table.scatter_add_(1, experts.long(), weights)[:, :E]


EXPECTED = gates(INDEX, WEIGHTS)


@pytest.mark.parametrize("shape", [(T, K), (2, 3, K), (T * K,), (T * K, 1)])
def test_indices_in_any_shape(shape: tuple[int, ...]) -> None:
    assert torch.equal(gates(*FORMS["indices"](INDEX.reshape(shape), WEIGHTS.reshape(shape), T, E, K)), EXPECTED)


def test_indices_alone_weigh_one() -> None:
    experts, weights = FORMS["unit"](INDEX[:, :1], rand(T, 3).double(), T, E, 1)
    assert torch.equal(experts, INDEX[:, :1])
    assert weights.dtype == torch.float64
    assert weights.tolist() == [[1.0]] * T


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
def test_a_mask(dtype: torch.dtype) -> None:
    mask = torch.nn.functional.one_hot(INDEX, E).to(dtype)
    assert torch.equal(gates(*FORMS["mask"](mask, WEIGHTS, T, E, K)), EXPECTED)


def test_a_row_of_zeros_is_a_dropped_token() -> None:
    mask = torch.nn.functional.one_hot(INDEX, E)
    mask[1] = 0
    mask[3, 1] = 0
    kept = WEIGHTS.clone()
    kept[1], kept[3, 1] = 0, 0
    experts, weights = FORMS["mask"](mask, WEIGHTS, T, E, K)
    assert experts[1].tolist() == [E, E]
    assert torch.equal(gates(experts, weights), gates(INDEX, kept))


@pytest.mark.parametrize("spoil", ["two hot", "not one"])
def test_a_mask_that_is_not_one_hot_is_unusual(spoil: str) -> None:
    mask = torch.nn.functional.one_hot(INDEX, E).float()
    if spoil == "two hot":
        mask[2, 0, :2] = 1
    else:
        mask[2, 0] *= 0.5
    with pytest.raises(Unusual, match="not one-hot"):
        FORMS["mask"](mask, WEIGHTS, T, E, K)


def test_dense_weights_keep_those_that_are_not_zero() -> None:
    experts, weights = FORMS["dense"](None, EXPECTED, T, E, K)
    assert experts.shape == weights.shape == (T, K)
    assert torch.equal(gates(experts, weights), EXPECTED)


def test_dense_with_fewer_experts_than_slots() -> None:
    few = EXPECTED.clone()
    few[0] = 0
    few[1, 2] = 0
    assert torch.equal(gates(*FORMS["dense"](None, few, T, E, K)), few)


def test_dense_with_too_many_experts_is_unusual() -> None:
    with pytest.raises(Unusual, match="more than 2 experts"):
        FORMS["dense"](None, EXPECTED + 1, T, E, K)


def test_a_negative_weight_asks_its_expert() -> None:
    assert torch.equal(gates(*FORMS["dense"](None, -EXPECTED, T, E, K)), -EXPECTED)


def test_a_weight_that_is_no_number_asks_its_expert() -> None:
    broken = EXPECTED.clone()
    broken[2, 2] = float("nan")
    experts, weights = FORMS["dense"](None, broken, T, E, K)
    assert weights[2][experts[2] == 2].isnan().all()


@pytest.mark.parametrize("form", ["indices", "unit", "mask"])
def test_another_number_of_slots_does_not_fit(form: str) -> None:
    selector = torch.nn.functional.one_hot(INDEX, E) if form == "mask" else INDEX
    with pytest.raises((RuntimeError, Unusual)):
        FORMS[form](selector, WEIGHTS, T, E, 3)


@pytest.mark.parametrize("form", FORMS)
def test_no_tokens(form: str) -> None:
    selector = torch.zeros((0, K, E) if form == "mask" else (0, K), dtype=torch.int64)
    given = torch.zeros(0, E) if form == "dense" else torch.zeros(0, K)
    experts, weights = FORMS[form](None if form == "dense" else selector, given, 0, E, K)
    assert experts.shape[0] == weights.shape[0] == 0
