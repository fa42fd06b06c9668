"""Experts that choose their tokens: forms, the same choice told by tokens, and what a compiled call does with others.

T tokens, E experts, C places of an expert.
"""

from __future__ import annotations

import pytest
import torch

import moec
from moec.frontends.torch.expertchoice import CHOSEN, by_expert, by_token, check, forms, never_repeats, slots_of
from moec.frontends.torch.recorder import record
from moec.frontends.torch.routing import Unusual
from tests.corpus import CASES
from tests.frontend.observed import example
from tests.frontend_units.build import rand

IDS = torch.tensor([[4, 0], [1, 2], [0, 4]])
WEIGHTS = torch.tensor([[0.5, 0.25], [2.0, 3.0], [7.0, 8.0]])


def test_both_forms_are_one_choice() -> None:
    first = by_expert(CHOSEN[0], IDS, WEIGHTS, 3)
    last = by_expert(CHOSEN[1], IDS.T, WEIGHTS.T, 3)
    for found in (first, last):
        assert torch.equal(found[0], IDS)
        assert torch.equal(found[1], WEIGHTS)


def test_told_by_tokens() -> None:
    experts, weights = by_token(IDS, WEIGHTS, 5)
    assert experts.tolist() == [[0, 3, 2], [3, 1, 3], [3, 1, 3], [3, 3, 3], [0, 3, 2]]
    assert weights.tolist() == [[0.25, 0, 7], [0, 2, 0], [0, 3, 0], [0, 0, 0], [0.5, 0, 8]]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (IDS, ["chosen"]),
        (IDS.T, ["chosen, experts last"]),
        (torch.tensor([[0, 1, 2], [2, 0, 1], [1, 2, 0]]), list(CHOSEN)),
        (IDS.float(), []),
        (IDS - 1, []),
        (IDS + 1, []),
        (IDS[:2], []),
        (torch.tensor([[4, 4], [1, 2], [0, 4]]), []),
        (IDS[:, :0], []),
    ],
    ids=["rows", "columns", "square", "floats", "negative", "too high", "other experts", "twice", "none"],
)
def test_forms_by_shape_and_range(ids: torch.Tensor, expected: list[str]) -> None:
    assert list(forms(ids, 3, 5)) == expected


@pytest.mark.parametrize(
    "ids", [IDS - 1, IDS + 1, torch.tensor([[4, 4], [1, 2], [0, 4]])], ids=["low", "high", "twice"]
)
def test_strange_ids_are_unusual(ids: torch.Tensor) -> None:
    with pytest.raises(Unusual):
        slots_of(CHOSEN[0], ids, WEIGHTS, 5, 3)


def test_no_places_are_fine() -> None:
    check(IDS[:, :0], 5, distinct=True)
    assert bool((slots_of(CHOSEN[0], IDS[:, :0], WEIGHTS[:, :0], 5, 3)[0] == 3).all())


class _Ids(torch.nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = x @ x.T
        ids = {
            "topk": lambda: scores.topk(3).indices,
            "transposed": lambda: scores.topk(3, dim=0)[1].t().contiguous(),
            "sorted": lambda: scores.argsort(-1)[:, :3],
            "the values": lambda: scores.topk(3).values.to(torch.int64),
            "half": lambda: scores.topk(3).indices // 2,
            "written": lambda: scores.topk(3).indices.clone().fill_(0),
        }
        return ids[self.how]()


@pytest.mark.parametrize("how", ["topk", "transposed", "sorted"])
def test_selections_never_repeat(how: str) -> None:
    log = record(_Ids(how), (rand(7, 4),), {})
    assert never_repeats(log, log.result.slot)


@pytest.mark.parametrize("how", ["the values", "half", "written"])
def test_other_integers_may(how: str) -> None:
    log = record(_Ids(how), (rand(7, 4),), {})
    assert not never_repeats(log, log.result.slot)


@pytest.mark.filterwarnings("ignore:.*MOEC231")
def test_a_call_with_ids_that_come_twice_is_the_originals() -> None:
    case = CASES["choice.methods"]
    original = case.make()
    fast = moec.compile(original, example_inputs=example(case))
    (layer,) = (layer for layer in fast.moec.report.layers if layer.kind == "moe")
    assert layer.cut == "submodule"
    assert 'by="expert"' in layer.ir_before
    x, weights = rand(9, 16), rand(4, 3).abs()
    good = torch.stack([torch.randperm(9)[:3] for _ in range(4)])
    twice = good.clone()
    twice[2, 1] = twice[2, 0]
    with torch.no_grad():
        assert torch.allclose(fast.mix(x, good, weights), original.mix(x, good, weights), atol=1e-5)
        assert not layer.fallbacks
        assert torch.equal(fast.mix(x, twice, weights), original.mix(x, twice, weights))
        assert layer.fallback_reasons == {"an expert chooses a token twice": 1}
        with pytest.raises(IndexError):
            fast.mix(x, good + 9, weights)
