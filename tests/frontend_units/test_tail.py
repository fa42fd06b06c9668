"""Norms behind an expert's last product are named by values, or refused with their operations.

E experts, D width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moec.frontends.torch.banks import unify
from moec.frontends.torch.body import Body, build_body
from moec.frontends.torch.instances import NotLifted, find_instances
from moec.frontends.torch.linears import LinearFinder
from moec.frontends.torch.recorder import record
from moec.frontends.torch.tail import Norm, with_tail
from tests.frontend_units.build import params_of, rand

E, D, WIDE = 3, 6, 5
Tail = Callable[[Any, int, Tensor], Tensor]


class Experts(nn.Module):
    """Every expert on all tokens, its `tail(self, e, rows)` behind it, weights that differ by token."""

    def __init__(self, tail: Tail) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(rand(E, WIDE, D)), nn.Parameter(rand(E, D, WIDE))
        self.w, self.b = nn.Parameter(1 + 0.3 * rand(D)), nn.Parameter(rand(D))
        self.ws, self.bs = nn.Parameter(1 + 0.3 * rand(E, D)), nn.Parameter(rand(E, D))
        self.__dict__["tail"] = tail

    def expert(self, e: int, x: Tensor) -> Tensor:
        out: Tensor = self.__dict__["tail"](self, e, F.linear(F.relu(F.linear(x, self.up[e])), self.down[e]))
        return out

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return torch.stack([self.expert(e, x) * weights[:, e, None] for e in range(E)]).sum(0)


def body_of(module: nn.Module) -> Body:
    params = params_of(module)
    log = record(module, (rand(7, D), rand(7, E)), {})
    linears = LinearFinder(log, params, lambda name: name in ("up", "down")).find(0, len(log.entries))
    instances = [with_tail(log, instance, params) for instance in find_instances(log, linears)]
    return build_body(log, instances, unify(log, module, "", instances, params), params)


def rms(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


NAMED: list[tuple[Tail, Norm | None]] = [
    (lambda m, e, y: y, None),
    (lambda m, e, y: rms(y, 1e-5), Norm("rms", 1e-5)),
    (lambda m, e, y: m.w * rms(y, 1e-6), Norm("rms", 1e-6)),
    (lambda m, e, y: rms(y, 1e-6) * (1 + m.w), Norm("rms", 1e-6, shift=1.0)),
    (lambda m, e, y: rms(y * (1 + m.w), 1e-8), Norm("rms", 1e-8, shift=1.0, before=True)),
    (lambda m, e, y: F.rms_norm(y, (D,), m.w, eps=1e-6), Norm("rms", 1e-6)),
    (lambda m, e, y: F.layer_norm(y, (D,), m.w, m.b, eps=1e-3), Norm("layer", 1e-3)),
    (lambda m, e, y: F.layer_norm(y, (D,)), Norm("layer", 1e-5)),
    (lambda m, e, y: F.layer_norm(y, (D,), m.ws[e], m.bs[e]), Norm("layer", 1e-5)),
    (lambda m, e, y: rms(y, 1e-6) * m.ws[e], Norm("rms", 1e-6)),
]


@pytest.mark.parametrize(("tail", "norm"), NAMED, ids=lambda v: str(v) if isinstance(v, Norm | None) else "")
def test_norms_are_named(tail: Tail, norm: Norm | None) -> None:
    module = Experts(tail)
    body = body_of(module)
    assert body.tail == norm
    x = 3 * rand(9, D)
    for e in range(E):
        mine = body.expert(params_of(module), e, x)
        torch.testing.assert_close(mine, module.expert(e, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "tail",
    [
        lambda m, e, y: y.softmax(-1),
        lambda m, e, y: y - y.mean(-1, keepdim=True),
        lambda m, e, y: rms(y, 1e-6) * m.w * m.b,
        lambda m, e, y: y / y.norm(dim=-1, keepdim=True),
        lambda m, e, y: y + rms(y, 1e-6),
    ],
    ids=["softmax", "centred", "two weights", "unit length", "residual"],
)
def test_other_operations_on_rows_are_refused_by_name(tail: Tail) -> None:
    with pytest.raises(NotLifted, match="the operations behind the experts' layers have no name here: "):
        body_of(Experts(tail))


def test_a_whole_stack_is_no_experts_vector() -> None:
    with pytest.raises(NotLifted, match="no vector"):
        body_of(Experts(lambda m, e, y: rms(y, 1e-6) * m.ws.sum(0)))


def test_what_weights_do_is_no_tail() -> None:
    """A norm over experts or tokens, or of what is already weighted, is not the expert's own."""
    assert body_of(Experts(lambda m, e, y: y * 2)).tail is None
