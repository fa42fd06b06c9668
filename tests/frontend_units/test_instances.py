"""Experts are found as two layers of products; what differs between two of them, or mixes them with others, is seen.

R rows, D width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moec.frontends.torch.instances import Instance, NotLifted, Signature, find_instances, roles, signature
from moec.frontends.torch.linears import LinearFinder
from moec.frontends.torch.oplog import Log
from moec.frontends.torch.recorder import record
from tests.frontend_units.build import Do, given, params_of, rand

D, WIDE = 4, 6


def find(does: Callable[..., Any], *args: Tensor, **parts: Any) -> tuple[Log, list[Instance]]:
    """Experts 0 and 1 have gate g, up u [F, D] and down d [D, F]; `s` is one number, `v` a vector [F]."""
    weights = {f"{n}{e}": rand(WIDE, D, seed=e) for n in "gu" for e in range(2)}
    weights |= {f"d{e}": rand(D, WIDE, seed=9 + e) for e in range(2)}
    module = Do(does, **weights, s=rand(1), v=rand(WIDE), sq=rand(WIDE, WIDE), b=rand(WIDE), **parts)
    log = record(module, args, {})
    params = params_of(module)
    products = LinearFinder(log, params, lambda name: name[0] in "gud" or name == "sq").find(0, len(log.entries))
    return log, find_instances(log, products)


def gated(m: Any, x: Tensor, e: int = 0) -> Tensor:
    return F.linear(F.silu(F.linear(x, getattr(m, f"g{e}"))) * F.linear(x, getattr(m, f"u{e}")), getattr(m, f"d{e}"))


def plain(m: Any, x: Tensor, e: int = 0) -> Tensor:
    return F.linear(F.relu(F.linear(x, getattr(m, f"u{e}"))), getattr(m, f"d{e}"))


def test_a_gated_expert_has_two_first_layers() -> None:
    log, (found,) = find(gated, rand(3, D))
    assert [up.weight.param for up in found.ups] == ["g0", "u0"]
    assert found.down is not None
    assert found.down.weight.param == "d0"
    assert [log.entries[i].name for i in found.middle] == ["silu", "mul"]
    assert found.rows == given(log)
    assert set(found.middle) < set(found.entries)
    assert sorted(roles(found)) == ["w_down", "w_up0", "w_up1"]


def test_a_plain_expert_with_a_bias() -> None:
    def biased(m: Any, x: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(x, m.u0, m.b)), m.d0)

    _, (found,) = find(biased, rand(3, D))
    assert {role: view.param for role, view in roles(found).items()} == {"w_up0": "u0", "b_up0": "b", "w_down": "d0"}


def test_several_experts_in_one_run() -> None:
    log, found = find(lambda m, x: gated(m, x[:2]) + gated(m, x[2:], 1), rand(4, D))
    assert [i.ups[0].weight.param for i in found] == ["g0", "g1"]
    assert signature(log, found[0]).same(signature(log, found[1]))


def test_products_alone_are_experts_of_one_matrix() -> None:
    _, found = find(lambda m, x: (F.linear(x, m.u0), F.linear(x, m.u1)), rand(3, D))
    assert [(len(i.ups), i.down, i.middle) for i in found] == [(1, None, ()), (1, None, ())]


def test_a_number_in_between_is_no_mixture() -> None:
    _, found = find(lambda m, x: F.linear(F.linear(x, m.u0).relu() * torch.tensor(3.0) * 0.5, m.d0), rand(3, D))
    assert len(found) == 1


def test_a_parameter_in_between_is_no_number() -> None:
    """However small: what was a one when it was looked at is trained or loaded later."""
    with pytest.raises(NotLifted, match="mixed with parameter 's'"):
        find(lambda m, x: F.linear(F.linear(x, m.u0).relu() * m.s, m.d0), rand(3, D))


def twice_down(m: Any, x: Tensor) -> Tensor:
    h = F.linear(x, m.u0).relu()
    return F.linear(h, m.d0) + F.linear(h, m.d1)


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "three matrices in a row": (
        lambda m, x: F.linear(F.linear(F.linear(x, m.u0).relu(), m.sq).relu(), m.d0),
        "chain more than two",
    ),
    "a hidden value used by two": (
        twice_down,
        "read the same expert's hidden",
    ),
    "a product on its own": (lambda m, x: (plain(m, x), F.linear(x, m.g1)), "'g1' is used outside"),
    "a parameter mixed in": (
        lambda m, x: F.linear(F.linear(x, m.u0).relu() * m.v, m.d0),
        "mixed with parameter 'v' by mul",
    ),
    "a tensor mixed in": (
        lambda m, x: F.linear(F.linear(x, m.u0).relu() + x.sum(-1, keepdim=True), m.d0),
        r"mixed with a tensor of shape \(3, 4\) by sum",
    ),
    "first layers of different rows": (
        lambda m, x: F.linear(F.linear(x, m.g0).relu() * F.linear(x * 2, m.u0), m.d0),
        "read different rows",
    ),
    "three first layers": (
        lambda m, x: F.linear(F.linear(x, m.g0) * F.linear(x, m.u0) * F.linear(x, m.u1), m.d0),
        "3 first layers",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_expert(what: str) -> None:
    does, reason = REFUSED[what]
    with pytest.raises(NotLifted, match=reason):
        find(does, rand(3, D))


def test_first_layers_of_equal_rows_are_of_the_same() -> None:
    """Code that gathers its rows once for each layer."""
    take = torch.tensor([0, 2])
    _, (found,) = find(
        lambda m, x: F.linear(F.silu(F.linear(x[take], m.g0)) * F.linear(x[take], m.u0), m.d0), rand(3, D)
    )
    assert len(found.ups) == 2


def compared(first: Callable[..., Any], second: Callable[..., Any], rows: tuple[int, int] = (2, 3)) -> bool:
    n = rows[0]
    log, found = find(lambda m, x: (first(m, x[:n], 0), second(m, x[n:], 1)), rand(sum(rows), D))
    return signature(log, found[0]).same(signature(log, found[1]))


def shaped(m: Any, x: Tensor, e: int) -> Tensor:
    h = F.linear(x, getattr(m, f"u{e}")).view(len(x), 2, WIDE // 2)
    return F.linear(h.relu().view(len(x), WIDE), getattr(m, f"d{e}"))


def clamped(limit: float) -> Callable[..., Tensor]:
    def run(m: Any, x: Tensor, e: int) -> Tensor:
        return F.linear(F.linear(x, getattr(m, f"u{e}")).clamp(max=limit), getattr(m, f"d{e}"))

    return run


def test_the_number_of_rows_may_differ_between_experts() -> None:
    assert compared(shaped, shaped)
    assert compared(plain, plain)


def test_other_operations_or_arguments_are_seen() -> None:
    assert not compared(plain, gated)
    assert not compared(plain, clamped(1.0))
    assert compared(clamped(1.0), clamped(1.0))
    assert not compared(clamped(1.0), clamped(2.0))


def test_an_argument_is_only_the_number_of_rows_where_it_is_for_both() -> None:
    three, five = Signature(3, ("view", 3, 8)), Signature(5, ("view", 5, 8))
    assert three.same(five)
    assert not three.same(Signature(5, ("view", 3, 9)))
    assert not three.same(Signature(5, ("view", 4, 8)))
    assert not three.same(Signature(5, ("view", 5, 8, "more")))
    assert Signature(3, ("view", 8)).same(Signature(5, ("view", 8)))
    # 8 rows and an 8 that means the width: equal numbers are equal, whatever they mean.
    assert Signature(8, ("view", 8)).same(Signature(2, ("view", 8)))
