"""Which parameter element stands where in a moved operand, and the experts' matrices read off batched products.

T tokens, K experts per token, E experts, D width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given as forall
from hypothesis import strategies as st
from torch import Tensor, nn

from moec.frontends.torch import coordinates
from moec.frontends.torch.activation import Activation
from moec.frontends.torch.batched import read_batched
from moec.frontends.torch.coordinates import Operand, line, moved_from, number, stack_of
from moec.frontends.torch.instances import NotLifted
from moec.frontends.torch.recorder import record
from tests.frontend_units.build import Do, params_of, rand, result, value

E, D, WIDE = 3, 4, 5
PICK = torch.tensor([2, 0, 2, 1])

MOVED: dict[str, Callable[[Any], Tensor]] = {
    "itself": lambda m: m.w,
    "gathered": lambda m: m.w[PICK],
    "gathered by two": lambda m: m.w[PICK.view(2, 2)],
    "index_select": lambda m: m.w.index_select(0, PICK),
    "embedding": lambda m: F.embedding(PICK, m.w.view(E, -1)).view(4, WIDE, D),
    "permuted": lambda m: m.w.permute(2, 0, 1),
    "permuted and copied": lambda m: m.w.permute(2, 0, 1).reshape(D, E * WIDE),
    "one of them": lambda m: m.w[1].t(),
    "every other row": lambda m: m.w[:, ::2],
    "halves": lambda m: m.w.chunk(2, dim=-1)[1],
    "stacked": lambda m: torch.stack([m.a, m.b]),
    "stacked and gathered": lambda m: torch.stack([m.a, m.b])[torch.tensor([1, 0, 1])],
    "joined": lambda m: torch.cat([m.a, m.b], dim=1),
    "expanded": lambda m: m.w.unsqueeze(1).expand(E, 2, WIDE, D),
    "repeated": lambda m: m.a.repeat(2, 1),
}


@pytest.mark.parametrize("how", MOVED)
def test_each_elements_number_leads_to_its_value(how: str) -> None:
    module = Do(lambda m, x: MOVED[how](m), w=rand(E, WIDE, D), a=rand(WIDE, D, seed=1), b=rand(WIDE, D, seed=2))
    log = record(module, (rand(1),), {})
    params = params_of(module)
    slot = result(log)
    moves = moved_from(log, slot, len(log.entries), params)
    assert moves is not None
    operand = number(log, slot, moves, params)
    flat = [params[name].detach().flatten() for name in operand.names]
    decoded = torch.stack(
        [flat[o][i] for o, i in zip(operand.owner.flatten().tolist(), operand.offset.flatten().tolist(), strict=True)]
    )
    assert torch.equal(decoded.reshape(operand.owner.shape), value(log, slot))


@forall(st.permutations(range(3)), st.lists(st.integers(0, E - 1), min_size=1, max_size=5), st.integers(1, 2))
def test_numbers_through_random_movement(order: list[int], pick: list[int], step: int) -> None:
    module = Do(lambda m, x: m.w[torch.tensor(pick)].permute(*order)[..., ::step].contiguous(), w=rand(E, WIDE, D))
    log = record(module, (rand(1),), {})
    params = params_of(module)
    moves = moved_from(log, result(log), len(log.entries), params)
    assert moves is not None
    operand = number(log, result(log), moves, params)
    assert torch.equal(params["w"].detach().flatten()[operand.offset], value(log, result(log)))


NOT_MOVED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "computed": lambda m, x: m.w * 2,
    "computed and moved": lambda m, x: m.w.exp()[PICK],
    "something else": lambda m, x: x.view(1, 1),
    "joined with something else": lambda m, x: torch.cat([m.a, x.expand(1, D)]),
    "written": lambda m, x: m.a.clone().mul_(2),
}


@pytest.mark.parametrize("how", NOT_MOVED)
def test_what_was_not_only_moved(how: str) -> None:
    module = Do(NOT_MOVED[how], w=rand(E, WIDE, D), a=rand(WIDE, D))
    log = record(module, (rand(1),), {})
    assert moved_from(log, result(log), len(log.entries), params_of(module)) is None


def test_a_batch_too_large_to_follow_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinates, "_LARGEST", E * WIDE * D)
    module = Do(lambda m, x: m.w[PICK], w=rand(E, WIDE, D))
    log = record(module, (rand(1),), {})
    with pytest.raises(NotLifted, match="too large to follow"):
        number(log, result(log), {0}, params_of(module))


def test_a_line_is_evenly_spaced() -> None:
    numbers = torch.arange(12).view(3, 4)
    expert = torch.zeros_like(numbers)
    along = line(expert, numbers, 0)
    assert (along.base, along.step, along.length, along.feature.tolist()) == (0, 4, 3, [0, 1, 2])
    shuffled = line(expert, numbers[[2, 0, 1]], 0)
    assert (shuffled.base, shuffled.step, shuffled.feature.tolist()) == (0, 4, [2, 0, 1])
    with pytest.raises(NotLifted, match="not evenly spaced"):
        line(expert, numbers[:, [0, 1, 3, 2]] ** 2, 1)


def test_stacks_of_different_shapes_are_refused() -> None:
    numbers = torch.zeros(2, dtype=torch.int64)
    operand = Operand(("a", "b"), numbers, numbers)
    with pytest.raises(NotLifted, match="differ in width"):
        stack_of(operand, {"a": rand(2, 3), "b": rand(3, 3)})
    alone = Operand(("a",), numbers, numbers)
    with pytest.raises(NotLifted, match="'a' is not a stack"):
        stack_of(alone, {"a": rand(4, 3).t()})


class Batched(nn.Module):
    """Weights up [E, F, D] and down [E, D, F] kept in a layout of the case's own."""

    def __init__(self, does: Callable[[Any, Tensor], Any], up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.__dict__["does"] = does
        self.up, self.down = nn.Parameter(up), nn.Parameter(down)

    def forward(self, x: Tensor) -> Any:
        return self.__dict__["does"](self, x)


UP, DOWN = rand(E, WIDE, D, seed=5), rand(E, D, WIDE, seed=6)
INDEX = torch.tensor([[0, 2], [1, 2], [2, 0], [1, 0], [0, 1], [2, 1]])

BATCHED: dict[str, tuple[Callable[[Any, Tensor], Any], Tensor, Tensor]] = {
    "bmm of all": (
        lambda m, x: torch.bmm(torch.bmm(x.expand(E, 6, D), m.up.mT).relu(), m.down.mT),
        UP,
        DOWN,
    ),
    "bmm of all, transposed storage": (
        lambda m, x: torch.bmm(torch.bmm(x.expand(E, 6, D), m.up).relu(), m.down),
        UP.mT.contiguous(),
        DOWN.mT.contiguous(),
    ),
    "einsum of all": (
        lambda m, x: torch.einsum("etf,edf->etd", torch.einsum("td,efd->etf", x, m.up).relu(), m.down),
        UP,
        DOWN,
    ),
    "einsum of all, tokens first": (
        lambda m, x: torch.einsum("tef,edf->ted", torch.einsum("td,efd->tef", x, m.up).relu(), m.down),
        UP,
        DOWN,
    ),
    "einsum of gathered": (
        lambda m, x: torch.einsum("tkf,tkdf->tkd", torch.einsum("td,tkfd->tkf", x, m.up[INDEX]).relu(), m.down[INDEX]),
        UP,
        DOWN,
    ),
    "bmm of gathered": (
        lambda m, x: torch.bmm(
            m.down[INDEX.flatten()],
            torch.bmm(m.up[INDEX.flatten()], x.repeat_interleave(2, 0).unsqueeze(-1)).relu(),
        ),
        UP,
        DOWN,
    ),
    "one product for all": (
        lambda m, x: torch.einsum("tef,edf->ted", (x @ m.up.view(E * WIDE, D).t()).view(6, E, WIDE).relu(), m.down),
        UP,
        DOWN,
    ),
}


@pytest.mark.parametrize("how", BATCHED)
def test_the_body_of_batched_experts(how: str) -> None:
    module = Batched(*BATCHED[how])
    x = rand(6, D)
    log = record(module, (x,), {})
    params = params_of(module)
    reading = read_batched(log, set(params), params)
    assert reading.body.experts == E
    assert reading.reached == {0, 1, 2}
    assert reading.body.activation == Activation("relu")
    for e in range(E):
        mine = reading.body.expert(params, e, x)
        torch.testing.assert_close(mine, F.linear(F.relu(F.linear(x, UP[e])), DOWN[e]))


def test_only_gathered_experts_were_reached_but_all_are_there() -> None:
    some = torch.tensor([[0, 2]] * 6)
    module = Batched(
        lambda m, x: torch.einsum("tkf,tkdf->tkd", torch.einsum("td,tkfd->tkf", x, m.up[some]).relu(), m.down[some]),
        UP,
        DOWN,
    )
    log = record(module, (rand(6, D),), {})
    params = params_of(module)
    reading = read_batched(log, set(params), params)
    assert reading.reached == {0, 2}
    x = rand(2, D, seed=3)
    torch.testing.assert_close(reading.body.expert(params, 1, x), F.linear(F.relu(F.linear(x, UP[1])), DOWN[1]))


def test_batched_products_with_a_bias() -> None:
    class Biased(Batched):
        def __init__(self) -> None:
            super().__init__(
                lambda m, x: (
                    torch.bmm((torch.bmm(x.expand(E, 6, D), m.up.mT) + m.b[:, None]).relu(), m.down.mT) + m.c[:, None]
                ),
                UP,
                DOWN,
            )
            self.b, self.c = nn.Parameter(rand(E, WIDE)), nn.Parameter(rand(E, D))

    module, x = Biased(), rand(6, D)
    log = record(module, (x,), {})
    params = params_of(module)
    body = read_batched(log, {"up", "down"}, params).body
    assert sorted(body.banks) == ["b_down", "b_up0", "w_down", "w_up0"]
    for e in range(E):
        expected = F.linear(F.relu(F.linear(x, UP[e], module.b[e])), DOWN[e], module.c[e])
        torch.testing.assert_close(body.expert(params, e, x), expected)


def test_nothing_batched_is_refused() -> None:
    module = Batched(lambda m, x: x * 2, UP, DOWN)
    log = record(module, (rand(6, D),), {})
    with pytest.raises(NotLifted, match="no product with the candidate's weights"):
        read_batched(log, {"up", "down"}, params_of(module))
