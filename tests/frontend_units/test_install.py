"""What stands in place of a method: when it runs the compiled layer, when the original, and that users can tell.

D width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moec.errors import MoecError
from moec.frontends.torch.fallback import FallbackWarning
from moec.frontends.torch.install import (
    installed,
    uninstall,
)
from moec.frontends.torch.routing import Unusual
from tests.frontend_units.installed import Installed, Layer, X

pytestmark = pytest.mark.filterwarnings("error")


def test_in_eval_mode_the_compiled_layer_runs(layer: Installed) -> None:
    with torch.no_grad():
        layer.module(X)
        layer.module(X, scale=2.0)
    assert layer.ran() == (2, 0)
    assert layer.report.fallbacks == 0


@pytest.mark.parametrize("grad", [False, True])
def test_results_keep_their_structure(layer: Installed, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        y, scale, number = layer.module(X, 2.0)
        want = layer.method.original(X, 2.0)
    torch.testing.assert_close(y, want[0])
    assert y.requires_grad is grad
    assert (scale, number.tolist(), number.requires_grad) == (2.0, [0, 1, 2], False)


def in_training(layer: Installed) -> Any:
    layer.module.train()
    return layer.module(X)


def under_autocast(layer: Installed) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return layer.module(X)


def hooked(register: str) -> Callable[[Installed], Any]:
    def run(layer: Installed) -> Any:
        getattr(layer.module.inner, register)(lambda *args: None)
        return layer.module(X)

    return run


def with_global_hook(layer: Installed) -> Any:
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        return layer.module(X)
    finally:
        handle.remove()


def unusual(layer: Installed) -> Any:
    layer.call.error = Unusual("the input has another rank")
    return layer.module(X)


def moved(layer: Installed) -> Any:
    layer.call.error = MoecError("MOEC230", "weight 'inner.weight' is not in the module that was compiled")
    return layer.module(X)


FALLBACKS: dict[str, tuple[Callable[[Installed], Any], str]] = {
    "training": (in_training, "training mode"),
    "autocast": (under_autocast, "autocast is on"),
    "a forward hook": (hooked("register_forward_hook"), "has hooks"),
    "a pre-hook": (hooked("register_forward_pre_hook"), "has hooks"),
    "a backward hook": (hooked("register_full_backward_hook"), "has hooks"),
    "a global hook": (with_global_hook, "hooks on all modules"),
    "an unusual call": (unusual, "another rank"),
    "moved weights": (moved, "'inner.weight' is not in the module"),
}


@pytest.mark.parametrize("why", FALLBACKS)
def test_the_original_runs_and_says_so_once(layer: Installed, why: str) -> None:
    run, reason = FALLBACKS[why]
    with pytest.warns(FallbackWarning, match=reason) as told:
        y = run(layer)[0]
    assert str(told[0].message).startswith("[MOEC231] mlp runs its original code: ")
    assert (layer.ran(), layer.report.fallbacks) == ((0, 1), 1)
    assert y.shape == X.shape
    run(layer)
    assert (layer.ran(), layer.report.fallbacks) == ((0, 2), 2)


@pytest.mark.parametrize("why", FALLBACKS)
def test_strict_forbids_it(why: str) -> None:
    layer = Installed(strict=True)
    run, reason = FALLBACKS[why]
    with pytest.raises(MoecError, match=reason) as raised:
        run(layer)
    assert raised.value.code == "MOEC231"
    assert layer.ran() == (0, 0)


def test_the_warning_points_at_the_users_line(layer: Installed) -> None:
    layer.module.train()
    with pytest.warns(FallbackWarning) as told:
        nn.Sequential(layer.module)(X)
    assert told[0].filename == __file__


def test_back_in_eval_mode_it_is_compiled_again(layer: Installed) -> None:
    with pytest.warns(FallbackWarning):
        in_training(layer)
    layer.module.eval()(X)
    assert layer.ran() == (1, 1)


def test_a_removed_hook_is_forgotten(layer: Installed) -> None:
    handle = layer.module.inner.register_forward_hook(lambda *args: None)
    with pytest.warns(FallbackWarning):
        layer.module(X)
    handle.remove()
    layer.module(X)
    assert layer.ran() == (1, 1)


def test_hooks_on_the_layer_itself_are_called(layer: Installed) -> None:
    seen: list[int] = []
    layer.module.register_forward_hook(lambda *args: seen.append(1))
    layer.module(X)
    assert (seen, layer.ran()) == ([1], (1, 0))


@pytest.mark.parametrize("error", [MoecError("MOEC406", "a graph"), RuntimeError("of torch"), KeyError("k")])
def test_other_errors_are_not_hidden(layer: Installed, error: Exception) -> None:
    layer.call.error = error
    with pytest.raises(type(error)):
        layer.module(X)
    assert layer.report.fallbacks == 0


def gradients(module: nn.Module, x: Tensor, run: Callable[..., Any]) -> dict[str, Tensor]:
    module.zero_grad()
    x = x.clone().requires_grad_()
    run(x, 3.0)[0].square().sum().backward()
    assert x.grad is not None
    return {"x": x.grad, **{n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}}


def test_gradients_are_the_originals(layer: Installed) -> None:
    want = gradients(layer.module, X, layer.method.original)
    got = gradients(layer.module, X, layer.module)
    assert got.keys() == want.keys() == {"x", "inner.weight", "inner.bias"}
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient)
    assert layer.ran() == (1, 2)
    assert layer.report.fallbacks == 0


def test_only_what_requires_a_gradient_gets_one(layer: Installed) -> None:
    layer.module.inner.weight.requires_grad_(False)
    layer.module(X)[0].sum().backward()
    assert layer.module.inner.weight.grad is None
    assert layer.module.inner.bias.grad is not None
    layer.module.requires_grad_(False)
    assert layer.module(X)[0].grad_fn is None
    x = X.clone().requires_grad_()
    layer.module(x)[0].sum().backward()
    assert x.grad is not None


def test_no_graph_without_gradients(layer: Installed) -> None:
    with torch.no_grad():
        assert layer.module(X)[0].grad_fn is None
    with torch.inference_mode():
        assert layer.module(X)[0].is_inference()


def test_a_result_that_is_an_argument_stays_that_argument(layer: Installed) -> None:
    layer.method.call = lambda module, executable, args, kwargs: (executable(args[0])[0], args[0])  # type: ignore[assignment]
    x = X.clone().requires_grad_()
    y, same = layer.module(x)
    assert same is x
    assert y.requires_grad


def test_uninstalling_gives_the_class_its_method_back(layer: Installed) -> None:
    assert installed(nn.Sequential(layer.module)) == [layer.method]
    uninstall(layer.method)
    assert "forward" not in layer.module.__dict__
    layer.module(X)
    assert layer.ran() == (0, 1)


def test_uninstalling_leaves_another_override(layer: Installed) -> None:
    layer.module.forward = other = lambda x: x  # type: ignore[method-assign, assignment]
    uninstall(layer.method)
    assert layer.module.__dict__["forward"] is other


def test_the_signature_is_the_originals(layer: Installed) -> None:
    import inspect

    assert inspect.signature(layer.module.forward) == inspect.signature(Layer().forward)


def test_calls_are_counted_by_reason(layer: Installed) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            in_training(layer)
        layer.module.eval()
        under_autocast(layer)
        for i in range(30):
            layer.call.error = Unusual(f"argument {i}")
            layer.module(X)
    reasons = layer.report.fallback_reasons
    assert (reasons["the layer is in training mode"], reasons["autocast is on"]) == (2, 1)
    assert reasons["other reasons"] == 16
    assert sum(reasons.values()) == layer.report.fallbacks == 33
