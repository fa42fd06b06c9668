"""Experts that write to what they are given: to ids that stay what they are, to what the block owns, to the caller's.

T tokens, K experts a token, E experts, D width, F hidden width.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moec
from tests.frontend.modules import told
from tests.frontend.test_callers import agrees

D, WIDE, E = 8, 12, 4

pytestmark = pytest.mark.filterwarnings("ignore")


class Experts(nn.Module):
    """Weights gathered for each choice, ids clamped in place first."""

    lowest, highest = 0, E - 1

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(E, WIDE, D) / 3), nn.Parameter(torch.randn(E, D, WIDE) / 3)

    def prepare(self, ids: Tensor, weights: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        flat.clamp_(self.lowest, self.highest)
        return flat

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        chosen = self.prepare(ids, weights)
        rows = x.repeat_interleave(ids.shape[-1], 0)
        hidden = F.silu(torch.bmm(self.up[chosen], rows[..., None]))
        y = torch.bmm(self.down[chosen], hidden).squeeze(-1) * weights.reshape(-1, 1)
        return y.view(*ids.shape, D).sum(1)


class Narrow(Experts):
    """The last expert's tokens go to another, and the caller's ids with them."""

    highest = E - 2


class Doubling(Experts):
    """Routing weights are changed in place."""

    def prepare(self, ids: Tensor, weights: Tensor) -> Tensor:
        weights.mul_(2)
        return ids.reshape(-1)


class Negating(Experts):
    """Ids are changed when they are no longer needed."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        y = super().forward(x, ids, weights)
        ids.neg_()
        return y


class Block(nn.Module):
    def __init__(self, kind: type[nn.Module], *, shown: bool = False) -> None:
        super().__init__()
        self.router, self.experts, self.shown = nn.Linear(D, E), kind(), shown

    def forward(self, x: Tensor) -> Any:
        weights, ids = self.router(x).softmax(-1).topk(2)
        y = self.experts(x, ids, weights)
        return (y, ids, weights) if self.shown else y


def made(kind: type[nn.Module], **options: Any) -> Any:
    torch.manual_seed(0)
    return Block(kind, **options).eval()


def tokens(count: int) -> Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("shown", [False, True])
def test_a_clamp_that_changes_no_experts_id(shown: bool) -> None:
    model = made(Experts, shown=shown)
    fast = moec.compile(model, strict=True)
    assert fast.moec.report.layers[0].cut == "submodule"
    with torch.no_grad():
        for count in (1, 6, 40):
            agrees(fast(tokens(count)), model(tokens(count)))


def test_ids_that_the_clamp_would_change_are_the_originals() -> None:
    model = made(Experts)
    fast = moec.compile(model, strict=False)
    ids = torch.tensor([[0, E], [-1, 2]])
    x, weights = tokens(2), torch.ones(2, 2)
    mine, theirs = ids.clone(), ids.clone()
    with torch.no_grad(), told() as texts:
        agrees(fast.experts(x, mine, weights), model.experts(x, theirs, weights))
    assert torch.equal(mine, theirs)
    assert any("MOEC231" in text for text in texts)


class Padded(Experts):
    """Ids below 0 stand for no expert, and become 0."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return super().forward(x, ids, torch.where(ids >= 0, weights, 0.0))


def test_the_caller_sees_clamped_ids_that_stand_for_no_expert() -> None:
    model = made(Padded)
    fast = moec.compile(model, strict=False)
    assert fast.moec.report.layers[0].cut == "submodule"
    ids = torch.tensor([[0, 3], [-1, 2]])
    x, weights = tokens(2), torch.ones(2, 2)
    mine, theirs = ids.clone(), ids.clone()
    with torch.no_grad(), told() as texts:
        agrees(fast.experts(x, mine, weights), model.experts(x, theirs, weights))
    assert torch.equal(mine, theirs)
    assert any("MOEC231" in text for text in texts)


@pytest.mark.parametrize("shown", [False, True])
@pytest.mark.parametrize("kind", [Narrow, Doubling, Negating])
def test_writes_are_followed_or_refused(kind: type[nn.Module], shown: bool) -> None:
    """What the block made may be written to, where the writes go on being seen: never by a cut of the call alone."""
    model = made(kind, shown=shown)
    fast = moec.compile(model)
    (layer,) = fast.moec.report.layers
    assert (layer.cut == "slice") if layer.compiled else layer.reason
    with torch.no_grad():
        for count in (1, 6, 40):
            agrees(fast(tokens(count)), model(tokens(count)))


@pytest.mark.parametrize("kind", [Doubling, Negating])
def test_writes_to_what_the_block_made_are_compiled_with_it(kind: type[nn.Module]) -> None:
    (layer,) = moec.compile(made(kind), strict=True).moec.report.layers
    assert layer.cut == "slice"


@pytest.mark.parametrize("kind", [Narrow, Doubling, Negating])
def test_writes_to_the_callers_tensors_are_refused(kind: type[nn.Module]) -> None:
    experts = made(kind).experts
    given = (tokens(6), torch.arange(12).view(6, 2) % E, torch.rand(6, 2) + 0.1)
    report = moec.explain(experts, tuple(t.clone() for t in given))
    assert not report.compiled
    assert any(word in report.layers[0].reason for word in ("writes into", "in place")), report
