"""The backward of a compiled layer runs the original again: it must be the same function, run once for all to see."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import moec
from tests.frontend import changing
from tests.frontend.changing import Direct, Plain, Sliced, made
from tests.frontend.modules import told

KINDS = [Sliced, Direct, Plain]
X = torch.randn(2, 5, changing.D, generator=torch.Generator().manual_seed(1))


class Buffered(Sliced):
    """Reads a buffer on the way to the router."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(changing.E))

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = (self.router(rows) + self.shift).softmax(-1).topk(self.top_k)
        return weights, ids


def pair(kind: type[nn.Module]) -> tuple[Any, Any]:
    model = made(kind)
    fast = moec.compile(model)
    assert [layer.status for layer in fast.moec.report.layers] == ["compiled"]
    return model, fast


def gradients(model: nn.Module, between: Callable[[], Any] = lambda: None) -> list[Tensor | None]:
    model.zero_grad()
    x = X.clone().requires_grad_()
    loss = model(x).square().sum()
    between()
    loss.backward()
    return [x.grad, *(p.grad for p in model.parameters())]


def second(model: nn.Module) -> Any:
    x = X.clone().requires_grad_()
    (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(g.square().sum(), [x, *model.parameters()], allow_unused=True)


def of_a_parameter(model: nn.Module) -> Any:
    """A layer whose input depends on one of its own parameters."""
    x = X.clone().requires_grad_()
    p = next(p for p in model.parameters() if p.dim() > 1)
    grads = torch.autograd.grad(model(x * p.mean()).square().sum(), [x, p], create_graph=True)
    return grads, torch.autograd.grad(torch.stack([g.square().sum() for g in grads]).sum(), [x, p])


def third(model: nn.Module) -> Any:
    x = X.clone().requires_grad_()
    (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    (g,) = torch.autograd.grad(g.square().sum(), x, create_graph=True)
    return torch.autograd.grad(g.square().sum(), x)


def hessian_times_ones(model: nn.Module) -> Any:
    return torch.autograd.functional.hvp(lambda x: model(x).square().sum(), X, torch.ones_like(X))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("act", [second, of_a_parameter, third, hessian_times_ones])
def test_higher_derivatives(kind: type[nn.Module], act: Callable[[nn.Module], Any]) -> None:
    model, fast = pair(kind)
    for got, want in zip(tree_leaves(act(fast)), tree_leaves(act(model)), strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.detach().abs().max()))
    assert fast.moec.report.layers[0].fallbacks == 0


@pytest.mark.parametrize("part", ["router", "drop", "experts.1.down"])
@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_a_hook_is_called_once(part: str, kind: str) -> None:
    """The layer falls back rather than call it in the forward and again in the backward."""
    model, fast = pair(Sliced)
    calls: dict[str, int] = {"model": 0, "fast": 0}
    for name, m in (("model", model), ("fast", fast)):
        module = m.get_submodule(part)

        def count(*_: Any, name: str = name) -> None:
            calls[name] += 1

        (module.register_forward_hook if kind == "forward" else module.register_full_backward_hook)(count)
    with told():
        got, want = gradients(fast), gradients(model)
    assert calls["fast"] == calls["model"] == 1
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert fast.moec.report.layers[0].fallbacks == 1


def test_a_hook_registered_in_between_is_not_called() -> None:
    _, fast = pair(Sliced)
    calls: list[int] = []
    gradients(fast, lambda: fast.router.register_forward_hook(lambda *_: calls.append(1)))
    assert calls == []
    assert len(fast.router._forward_hooks) == 1


def test_a_buffer_written_to_in_between_is_an_error() -> None:
    _, fast = pair(Buffered)
    with pytest.raises(moec.MoecError, match="'shift' was written to in place") as raised:
        gradients(fast, lambda: fast.shift.add_(1))
    assert raised.value.code == "MOEC233"


def test_a_frozen_weight_written_to_in_between_is_an_error() -> None:
    _, fast = pair(Plain)
    fast.down.weight.requires_grad_(False)

    def write() -> None:
        with torch.no_grad():
            fast.down.weight.mul_(2)

    with pytest.raises(moec.MoecError, match=r"'down\.weight' was written to in place"):
        gradients(fast, write)


def test_a_weight_written_to_in_between_is_autograds_error() -> None:
    _, fast = pair(Plain)

    def write() -> None:
        with torch.no_grad():
            fast.up.weight.mul_(2)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(fast, write)


@pytest.mark.parametrize("what", ["up", "shift"])
def test_what_was_replaced_in_between_is_not_used(what: str) -> None:
    """Autograd's graph holds what the forward read, and so does a compiled layer's."""
    model, fast = pair(Buffered if what == "shift" else Plain)

    def replace(m: Any) -> Callable[[], None]:
        if what == "shift":
            return lambda: setattr(m, "shift", torch.full_like(m.shift, 3.0))
        return lambda: setattr(m.up, "bias", nn.Parameter(m.up.bias.detach() * 7))

    want, got = gradients(model, replace(model)), gradients(fast, replace(fast))
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fast(X), model(X))


def test_a_setting_changed_in_between_is_an_error() -> None:
    _, fast = pair(Sliced)
    with pytest.raises(moec.MoecError, match="'top_k' of the layer is 1, it was 2 when compiled"):
        gradients(fast, lambda: setattr(fast, "top_k", 1))


def test_training_mode_in_between_makes_no_difference() -> None:
    model, fast = pair(Plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = gradients(fast, fast.train)
    for a, b in zip(got, gradients(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert fast.training
