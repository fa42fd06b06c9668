"""One choice a token, tokens sorted by expert: rows are read where they lie."""

from __future__ import annotations

import pytest
import torch

from moec.backends.cpu.choose import EACH
from moec.backends.cpu.slots import find_slots
from tests.backends.cpu.layers import assert_right, inputs, make

EXPERTS = 6
IDS = {
    "as many for each": torch.arange(EXPERTS).repeat_interleave(40),
    "some hit": torch.tensor([1] * 70 + [4] * 3 + [5] * 90),
    "one": torch.full((150,), 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("ones", [True, False])
@pytest.mark.parametrize("name", IDS)
def test_it_is_the_layer(name: str, ones: bool, dtype: torch.dtype) -> None:
    case = make(EXPERTS, 48, 24, dtype=dtype, o=40)
    ids = IDS[name].view(-1, 1)
    x, _, weights = inputs(case, len(ids), 1)
    before = x.clone()
    found = assert_right(case, EACH, x, ids, torch.ones_like(weights) if ones else weights)
    assert torch.equal(x, before)
    assert found.data_ptr() != x.data_ptr()


def test_what_is_in_order() -> None:
    def in_order(ids: list[list[int]]) -> bool:
        return find_slots(torch.tensor(ids), EXPERTS).in_order

    assert in_order([[0], [0], [3]])
    assert not in_order([[0], [3], [0]])
    assert not in_order([[0, 1], [3, 4]])
    assert not in_order([[0], [3], [EXPERTS]]), "a token of no expert gets zeros"
    assert not in_order([[-1], [0], [3]])


def test_an_infinite_row_and_a_weight_of_zero() -> None:
    case = make(EXPERTS, 48, 24, o=40)
    ids = IDS["as many for each"].view(-1, 1)
    x, _, weights = inputs(case, len(ids), 1)
    x[5], weights[5], weights[6] = float("inf"), 0.0, float("nan")
    found = assert_right(case, EACH, x, ids, weights)
    assert found[6].isnan().all()
