"""Activations are named by values on separating inputs: each function in each layout, and none where none is right.

F hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moec.frontends.torch.activation import Activation, constants, name_activation
from moec.frontends.torch.banks import Bank
from moec.frontends.torch.body import build_body
from moec.frontends.torch.instances import NotLifted, find_instances, roles
from moec.frontends.torch.linears import LinearFinder
from moec.frontends.torch.recorder import record
from tests.frontend_units.build import Do, log_of, params_of, rand

WIDTH = 24
ERF_SCALE = 1 / math.sqrt(2)

# Written out in double precision: nothing of the table under test is used.
FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "silu": lambda x: x / (1 + (-x).exp()),
    "gelu": lambda x: x * 0.5 * torch.erfc(-x * ERF_SCALE),
    "gelu_tanh": lambda x: x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: torch.where(x > 0, x, 0),
    "relu2": lambda x: torch.where(x > 0, x * x, 0),
    "quick_gelu": lambda x: x / (1 + (-1.702 * x).exp()),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "tanh": lambda x: 1 - 2 / ((2 * x).exp() + 1),
    "softplus": lambda x: x.clamp(min=0) + (-x.abs()).exp().log1p(),
}
LAYOUTS = ["none", "pair", "pair_up_first", "concat", "concat_up_first", "interleaved", "interleaved_up_first"]


def halves(hidden: list[Tensor], layout: str) -> tuple[Tensor, Tensor]:
    if layout.startswith("pair"):
        first, second = hidden
    elif layout.startswith("concat"):
        first, second = hidden[0][:WIDTH], hidden[0][WIDTH:]
    else:
        first, second = hidden[0].view(WIDTH, 2).unbind(-1)
    return (second, first) if layout.endswith("up_first") else (first, second)


def widths(layout: str) -> list[int]:
    return [WIDTH] if layout == "none" else [WIDTH, WIDTH] if layout.startswith("pair") else [2 * WIDTH]


def named(
    gate: Callable[[Tensor], Tensor],
    layout: str,
    up: Callable[[Tensor], Tensor] = lambda u: u,
    numbers: tuple[float, ...] = (),
) -> Activation | None:
    def ask(hidden: list[Tensor]) -> Tensor:
        wide = [h.double() for h in hidden]
        if layout == "none":
            return gate(wide[0]).float()
        g, u = halves(wide, layout)
        return (gate(g) * up(u)).float()

    return name_activation(ask, widths(layout), WIDTH, numbers, 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fn", FORMULAS)
def test_each_function_in_each_layout(fn: str, layout: str) -> None:
    found = named(FORMULAS[fn], layout)
    # A product of two plain halves is the same whichever is called the gate.
    expected = layout.removesuffix("_up_first") if fn == "identity" else layout
    assert found == Activation(fn, None if layout == "none" else expected)


@pytest.mark.parametrize("limit", [0.5, 7.0, 50.0, 100.0])
@pytest.mark.parametrize("layout", ["none", "pair", "concat"])
def test_a_clamp_is_seen_however_far_out(layout: str, limit: float) -> None:
    """At unit scale none of these but the first would show."""
    found = named(
        lambda g: FORMULAS["silu"](g.clamp(max=limit)), layout, lambda u: u.clamp(-limit, limit), numbers=(limit,)
    )
    assert found == Activation("silu", None if layout == "none" else layout, limit=limit)


def test_a_clamp_after_the_activation() -> None:
    found = named(lambda g: FORMULAS["silu"](g).clamp(max=7), "interleaved", lambda u: u.clamp(-7, 7), numbers=(7.0,))
    assert found == Activation("silu", "interleaved", limit=7.0, clamp_after=True)


def test_the_clamped_shifted_swish() -> None:
    found = named(
        lambda g: g.clamp(max=7) / (1 + (-1.702 * g.clamp(max=7)).exp()),
        "interleaved",
        lambda u: u.clamp(-7, 7) + 1,
        numbers=(1.0, 1.702, 7.0),
    )
    assert found is not None
    assert (found.layout, found.limit, found.up_shift, found.clamp_after) == ("interleaved", 7.0, 1.0, False)
    assert found.fn == "quick_gelu" or (found.fn, found.alpha) == ("silu", 1.702)


def test_a_slope_of_its_own() -> None:
    assert named(lambda g: g / (1 + (-1.3 * g).exp()), "pair", numbers=(1.3,)) == Activation("silu", "pair", alpha=1.3)


def test_a_shift_of_the_up_half() -> None:
    assert named(FORMULAS["relu"], "concat", lambda u: u + 0.25, numbers=(0.25,)) == Activation(
        "relu", "concat", up_shift=0.25
    )


def test_gelu_is_not_its_approximation() -> None:
    exact, tanh = named(FORMULAS["gelu"], "none"), named(FORMULAS["gelu_tanh"], "none")
    assert exact == Activation("gelu")
    assert tanh == Activation("gelu_tanh")


BY_HAND: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * torch.pow(x, 3)))),
    "relu2": lambda x: torch.relu(x) ** 2,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


@pytest.mark.parametrize("fn", BY_HAND)
def test_code_written_by_hand_in_single_precision(fn: str) -> None:
    """Far below zero its rounding shows, and a large other half magnifies it."""
    found = name_activation(lambda h: BY_HAND[fn](h[0]) * h[1], [64, 64], 64, (), 1e-5)
    assert found == Activation(fn, "pair")


NAMELESS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x.softmax(-1),
    "rms norm": lambda x: x * x.square().mean().add(1e-6).rsqrt(),
    "layer norm": lambda x: (x - x.mean()) / x.var(unbiased=False).add(1e-5).sqrt(),
    "reversed": lambda x: FORMULAS["silu"](x.flip(0)),
    "cumulated": lambda x: x.cumsum(-1),
    "scaled": lambda x: FORMULAS["silu"](x) * 1.01,
    "cubed": lambda x: x**3,
    "one element left out": lambda x: torch.cat([FORMULAS["silu"](x[:-1]), x[-1:]]),
    "clamped where nobody says": lambda x: FORMULAS["silu"](x.clamp(max=20)),
    "leaky": lambda x: torch.where(x > 0, x, 0.01 * x),
    "almost silu": lambda x: FORMULAS["silu"](x) + 1e-3 * (x > 10),
}


@pytest.mark.parametrize("layout", ["none", "pair", "concat"])
@pytest.mark.parametrize("what", NAMELESS)
def test_what_has_no_name_gets_none(what: str, layout: str) -> None:
    assert named(NAMELESS[what], layout, numbers=(0.01, 1e-6, 3.0)) is None


def test_widths_that_are_no_layout_get_no_name() -> None:
    assert name_activation(lambda h: h[0][:WIDTH], [3 * WIDTH], WIDTH, (), 1e-5) is None


def test_numbers_come_from_arguments_and_constants() -> None:
    def code(m: Any, x: Tensor) -> Tensor:
        limit = torch.tensor(7.0)
        y: Tensor = x.clamp(-3.5, 2.5).add(1.25, alpha=2).minimum(limit) * m.factor
        return y

    log = log_of(code, rand(4), factor=torch.tensor(0.5))
    found = constants(log, range(len(log.entries)))
    assert {1.25, 2.0, 2.5, 3.5, 7.0} <= set(found)
    assert 0.5 not in found, "what the module owns may change, it is no constant"


def body_of(middle: Callable[[Tensor], Tensor]) -> Any:
    module = Do(lambda m, x: F.linear(middle(F.linear(x, m.up)), m.down), up=rand(6, 4), down=rand(4, 6))
    log = record(module, (rand(5, 4),), {})
    instances = find_instances(log, LinearFinder(log, params_of(module), lambda name: True).find(0, len(log.entries)))
    return build_body(log, instances, [Bank(role, (view,)) for role, view in roles(instances[0]).items()], {})


def test_recorded_code_is_asked() -> None:
    assert body_of(lambda h: F.silu(h.clamp(max=3.0))).activation == Activation("silu", limit=3.0)
    assert body_of(lambda h: h * torch.sigmoid(h)).activation == Activation("silu")
    assert body_of(lambda h: h.float().relu_().square_()).activation == Activation("relu2")


def test_recorded_code_without_a_name_is_refused_with_its_operations() -> None:
    with pytest.raises(NotLifted, match=r"have no name here: _?softmax"):
        body_of(lambda h: h.softmax(-1))
    with pytest.raises(NotLifted, match=r"have no name here: .*rsqrt"):
        body_of(lambda h: h * h.square().mean(-1, keepdim=True).rsqrt())


def test_rows_that_get_different_results_are_refused() -> None:
    def by_position(h: Tensor) -> Tensor:
        return h.cumsum(0)

    with pytest.raises(NotLifted, match="equal rows of an expert get different results"):
        body_of(by_position)


def test_a_description_for_people() -> None:
    assert str(Activation("silu", "concat_up_first")) == "silu, gated, concat up first"
    assert str(Activation("silu", "pair", alpha=1.3, limit=7.0, clamp_after=True, up_shift=1.0)) == (
        "silu(alpha=1.3), gated, pair, clamped at 7 afterwards, up + 1"
    )
