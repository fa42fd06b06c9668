"""Elementwise activations without a name are written down as formulas; others are refused.

D width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moec.frontends.torch.body import Body
from moec.frontends.torch.ffn import find_pairs
from moec.frontends.torch.formula import Written
from moec.frontends.torch.instances import NotLifted
from moec.frontends.torch.recorder import record
from tests.frontend_units.build import Do, params_of, rand

D, WIDE = 4, 6
Middle = Callable[[Tensor], Tensor]


def body_of(middle: Middle, outputs: int) -> tuple[Do, Body | None, list[str]]:
    module = Do(lambda m, x: F.linear(middle(F.linear(x, m.up)), m.down), up=rand(outputs, D), down=rand(D, WIDE))
    log = record(module, (rand(5, D),), {})
    refused: list[NotLifted] = []
    params = params_of(module)
    pairs = find_pairs(log, params, set(params), refused)
    from moec.frontends.torch.ffn import _body

    return module, _body(log, pairs[0]) if pairs else None, list(map(str, refused))


def halves(gated: Callable[[Tensor, Tensor], Tensor]) -> Middle:
    return lambda h: gated(*h.chunk(2, dim=-1))


def strides(gated: Callable[[Tensor, Tensor], Tensor]) -> Middle:
    return lambda h: gated(h[..., 0::2], h[..., 1::2])


WRITTEN: list[tuple[Middle, int, str]] = [
    (lambda h: torch.tanh(h / 3) * 3, WIDE, "tanh(a / 3) * 3"),
    (lambda h: F.silu(h).clamp(-1, 2) + 1, WIDE, "min(max(silu(a), -1), 2) + 1"),
    (lambda h: F.gelu(h, approximate="tanh") - h.square(), WIDE, "gelu_tanh(a) - square(a)"),
    (lambda h: h.clamp_max(5).exp().sub(1), WIDE, "exp(min(a, 5)) - 1"),
    (halves(lambda a, b: 4 * torch.tanh(a / 4) * torch.sigmoid(a) * b), 2 * WIDE, "tanh(a / 4) * 4 * sigmoid(a) * b"),
    (strides(lambda a, b: torch.tanh(a) * (b.tanh() + 1)), 2 * WIDE, "tanh(a) * (tanh(b) + 1)"),
    (halves(lambda a, b: a * torch.sigmoid(b) + F.relu(a)), 2 * WIDE, "a * sigmoid(b) + relu(a)"),
]


@pytest.mark.parametrize(("middle", "outputs", "text"), WRITTEN, ids=[text for *_, text in WRITTEN])
def test_elementwise_activations_are_written_down(middle: Middle, outputs: int, text: str) -> None:
    module, body, _ = body_of(middle, outputs)
    assert body is not None
    assert isinstance(body.activation, Written)
    assert body.activation.text == text
    x = 5 * rand(9, D)
    torch.testing.assert_close(body.expert(params_of(module), 0, x), module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "middle",
    [
        lambda h: torch.tanh(h - h.mean(-1, keepdim=True)),
        lambda h: torch.tanh(h).flip(-1),
        lambda h: torch.tanh(h).cumsum(-1),
        lambda h: torch.tanh(h * torch.arange(WIDE)),
    ],
    ids=["row mean", "flipped", "running sum", "a vector"],
)
def test_what_is_not_elementwise_is_refused(middle: Middle) -> None:
    _, body, refused = body_of(middle, WIDE)
    assert body is None
    assert "no name here" in refused[0] or "mixed with" in refused[0]


def test_scaling_is_no_activation() -> None:
    """Two matrices with a factor between them are a low-rank layer, not an FFN."""
    _, body, _ = body_of(lambda h: h * 0.5 + h, WIDE)
    assert body is None
