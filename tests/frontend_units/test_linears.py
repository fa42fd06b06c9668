"""Each way to write x @ W.T + b is found with W and b as views of the parameters; nothing else is.

R rows, C inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moec.frontends.torch.linears import Linear, LinearFinder
from moec.frontends.torch.oplog import Log
from moec.frontends.torch.recorder import record
from tests.frontend_units.build import Do, params_of, rand, read, value

R, C, N = 5, 3, 4
Write = Callable[[Any, Tensor], Any]


def find(does: Write, x: Tensor, accept: Callable[[str], bool] = lambda name: name in "wv") -> list[tuple[Log, Linear]]:
    """w is [N, C], v is [C, N], b is [N]; all of them are parameters."""
    module = Do(does, w=rand(N, C, seed=1), v=rand(C, N, seed=2), b=rand(N, seed=3), pack=rand(2 * N, C, seed=4))
    log = record(module, (x,), {})
    params = params_of(module)
    found = LinearFinder(log, params, accept).find(0, len(log.entries))
    for linear in found:
        rows = value(log, linear.source, linear.entry).reshape(-1, C)
        bias = read(params, linear.bias) if linear.bias is not None else None
        expected = F.linear(rows, read(params, linear.weight), bias)
        got = value(log, linear.out, linear.last + 1).reshape(-1, N)
        torch.testing.assert_close(got, expected.detach())
    return [(log, linear) for linear in found]


def add_late(m: Any, x: Tensor) -> Tensor:
    h: Tensor = x @ m.v
    h += m.b
    return h


def read_twice(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    h = x @ m.v
    return h + m.b, h * 2


ROWS = rand(R, C)
BIASED: dict[str, tuple[Write, Tensor]] = {
    "linear": (lambda m, x: F.linear(x, m.w, m.b), ROWS),
    "linear of sequences": (lambda m, x: F.linear(x, m.w, m.b), rand(2, R, C)),
    "linear of a vector": (lambda m, x: F.linear(x, m.w, m.b), rand(C)),
    "addmm": (lambda m, x: torch.addmm(m.b, x, m.v), ROWS),
    "baddbmm": (lambda m, x: torch.baddbmm(m.b[None, None], x[None], m.v[None]), ROWS),
    "bias afterwards": (lambda m, x: x @ m.v + m.b, ROWS),
    "bias before": (lambda m, x: m.b + x @ m.v, ROWS),
    "bias in place": (add_late, ROWS),
    "bias after a view": (lambda m, x: (x @ m.v).view(1, R, N) + m.b, ROWS),
    "part of a pack": (lambda m, x: F.linear(x, m.pack[N:], m.b), ROWS),
    "every other row of a pack": (lambda m, x: F.linear(x, m.pack[::2], m.b), ROWS),
}
PLAIN: dict[str, tuple[Write, Tensor]] = {
    "linear": (lambda m, x: F.linear(x, m.w), ROWS),
    "linear of sequences": (lambda m, x: F.linear(x, m.w), rand(2, R, C)),
    "mm": (lambda m, x: x @ m.v, ROWS),
    "mm transposed": (lambda m, x: x @ m.w.t(), ROWS),
    "bmm": (lambda m, x: torch.bmm(x[None], m.v[None]), ROWS),
    "mv": (lambda m, x: m.w.mv(x), rand(C)),
    "mv transposed": (lambda m, x: m.v.t().mv(x), rand(C)),
    "bias for another reader": (read_twice, ROWS),
    "a number": (lambda m, x: x @ m.v + 1, ROWS),
    "something computed": (lambda m, x: x @ m.v + m.b * 2, ROWS),
    "a scaled bias": (lambda m, x: torch.add(x @ m.v, m.b, alpha=2), ROWS),
}


@pytest.mark.parametrize("how", BIASED)
def test_a_product_with_a_bias(how: str) -> None:
    accept = (lambda name: name == "pack") if "pack" in how else (lambda name: name in "wv")
    ((_, linear),) = find(*BIASED[how], accept)
    assert linear.weight.shape == (N, C)
    assert linear.bias is not None
    assert (linear.bias.param, linear.bias.shape) == ("b", (N,))


@pytest.mark.parametrize("how", PLAIN)
def test_a_product_without_a_bias(how: str) -> None:
    ((_, linear),) = find(*PLAIN[how])
    assert linear.weight.shape == (N, C)
    assert linear.bias is None


NOT_PRODUCTS: dict[str, tuple[Write, Tensor]] = {
    "scaled": (lambda m, x: torch.addmm(m.b, x, m.v, alpha=2), ROWS),
    "with a bias that is computed": (lambda m, x: torch.addmm(m.b * 2, x, m.v), ROWS),
    "with a matrix for a bias": (lambda m, x: torch.addmm(x @ m.w.exp().t(), x, m.v), ROWS),
    "with a computed weight": (lambda m, x: x @ m.v.exp(), ROWS),
    "of two computed tensors": (lambda m, x: x @ x.t(), ROWS),
    "by elements": (lambda m, x: x[:, :1] * m.b, ROWS),
    "weight on the left": (lambda m, x: m.w @ x.t(), ROWS),
}


@pytest.mark.parametrize("how", NOT_PRODUCTS)
def test_what_is_no_such_product(how: str) -> None:
    assert find(*NOT_PRODUCTS[how]) == []


def test_only_accepted_weights_count() -> None:
    def both(m: Any, x: Tensor) -> Any:
        return x @ m.v + F.linear(x, m.w)

    assert [linear.weight.param for _, linear in find(both, ROWS)] == ["v", "w"]
    assert [linear.weight.param for _, linear in find(both, ROWS, lambda name: name == "w")] == ["w"]


def test_products_come_in_order_with_their_entries() -> None:
    (log, first), (_, second) = find(lambda m, x: (F.linear(x, m.w), x @ m.v), ROWS)
    assert first.entry < second.entry
    assert log.entries[second.entry].name == "mm"


def test_the_bias_moves_the_end_of_the_product() -> None:
    ((log, linear),) = find(lambda m, x: (x @ m.v + m.b).exp(), ROWS)
    assert log.entries[linear.last].name == "add"
    assert linear.out == log.entries[linear.last].results[0]
