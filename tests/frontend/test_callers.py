"""What calls a compiled model besides plain code: torch.func, tracers, exporters, dispatch modes, shallow copies."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import moec
from tests.frontend import changing
from tests.frontend.changing import Direct, Plain, Sliced, made
from tests.frontend.modules import told

KINDS = [Sliced, Direct, Plain]
X = torch.randn(2, 5, changing.D, generator=torch.Generator().manual_seed(1))

pytestmark = pytest.mark.filterwarnings("ignore")


def other_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() * 1.1 for name, p in model.named_parameters()}


def call_with(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    y: Tensor = torch.func.functional_call(model, given, (X,))
    return y


def grad_of_functional(model: nn.Module) -> Any:
    return torch.func.grad(lambda given: call_with(model, given).square().sum())(other_weights(model))


def jvp(model: nn.Module) -> Any:
    return torch.func.jvp(model, (X,), (torch.ones_like(X),))


def jacrev(model: nn.Module) -> Any:
    return torch.func.jacrev(lambda x: model(x).sum((0, 1)))(X)


def dual(model: nn.Module) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(X, torch.ones_like(X)))).tangent


def vmap(model: nn.Module) -> Any:
    return torch.func.vmap(model)(X)


def trace(model: nn.Module) -> Any:
    return torch.jit.trace(model, (X,), check_trace=False)(X)


def proxies(model: nn.Module) -> Any:
    return make_fx(model)(X)(X)


def flops(model: nn.Module) -> Any:
    with FlopCounterMode(display=False) as counter:
        y = model(X)
    return y, torch.tensor(counter.get_total_flops())


ORIGINAL: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "torch.func.grad": (grad_of_functional, "torch.func transform"),
    "torch.func.jvp": (jvp, "torch.func transform"),
    "torch.func.jacrev": (jacrev, "torch.func transform"),
    "torch.func.vmap": (vmap, "torch.func transform"),
    "forward-mode": (dual, "forward-mode"),
    "torch.jit.trace": (trace, "torch.jit.trace"),
    "make_fx": (proxies, "TorchDispatchMode"),
    "counting flops": (flops, "hooks"),
}


def agrees(got: Any, want: Any) -> None:
    mine, theirs = tree_leaves(got), tree_leaves(want)
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        if isinstance(b, Tensor):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        else:
            assert (a is None) == (b is None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ORIGINAL)
def test_the_original_serves_what_needs_its_operations(name: str, kind: type[nn.Module]) -> None:
    act, reason = ORIGINAL[name]
    model = made(kind)
    fast = moec.compile(model)
    try:
        want = act(model)
    except Exception:
        pytest.skip("the original raises")
    with told() as texts:
        agrees(act(fast), want)
    (layer,) = fast.moec.report.layers
    assert layer.fallbacks >= 1
    assert any(reason in text for text in texts), texts
    count = layer.fallbacks
    with torch.no_grad():
        agrees(fast(X), model(X))
    assert layer.fallbacks == count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad", [False, True])
def test_functional_call(kind: type[nn.Module], grad: bool) -> None:
    """Other parameters for one call; its backward comes after they are gone."""
    model = made(kind)
    fast = moec.compile(model)

    def run(m: nn.Module) -> Any:
        given = {name: p.requires_grad_(grad) for name, p in other_weights(m).items()}
        y = call_with(m, {name: p * 1.5 for name, p in given.items()})
        if grad:
            y.square().sum().backward()
        return y.detach(), {name: p.grad for name, p in given.items()}

    agrees(run(fast), run(model))
    assert fast.moec.report.layers[0].fallbacks == 0
    agrees(fast(X), model(X))


def shallow(model: Any) -> Any:
    again = copy.copy(model)
    if isinstance(model, Direct):
        again.experts = copy.copy(model.experts)
    (again.experts.config if isinstance(model, Direct) else again).scale = 3.0
    again.top_k = 1
    return again


def replica(model: Any) -> Any:
    """As nn.DataParallel makes them: the same attributes, children and parameters of its own."""
    again = model._replicate_for_data_parallel()
    for name, child in model._modules.items():
        again._modules[name] = replica(child)
    for name, p in model._parameters.items():
        again._parameters[name] = None if p is None else nn.Parameter(p.detach() * 1.3)
    return again


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [shallow, replica])
def test_a_shallow_copy_runs_on_what_it_holds(kind: type[nn.Module], make: Callable[[Any], Any]) -> None:
    model = made(kind)
    fast = moec.compile(model)
    with torch.no_grad():
        before = model(X)
        with told() as texts:
            got = make(fast)(X)
        agrees(got, make(model)(X))
        assert not torch.allclose(got, before)
    assert any("shallow copy" in text for text in texts)
    assert fast.moec.report.layers[0].fallbacks == 1
