"""What stands in place of a method: when it runs the compiled layer, when the original, and that users can tell.

D width.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moec.errors import MoecError
from moec.frontends.torch.install import (
    CompiledMethod,
    FallbackWarning,
    drop_own_methods,
    install,
    installed,
    uninstall,
)
from moec.frontends.torch.routing import Unusual
from moec.report import LayerReport
from moec.weights import View, WeightStore
from tests.frontend_units.build import rand

D = 4


class Layer(nn.Module):
    """x -> (inner(x) * scale, a number, an integer tensor)"""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)
        # A counter that nobody watches: a number would be a setting that has changed.
        self.counter = torch.zeros((), dtype=torch.int64)

    @property
    def ran(self) -> int:
        return int(self.counter)

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, float, Tensor]:
        self.counter.add_(1)
        y: Tensor = self.inner(x)
        return y.tanh() * scale, scale, torch.arange(3)


class Call:
    """Computes the same through an executable, and counts; raises what it is told to."""

    dtype = torch.float32

    def __init__(self) -> None:
        self.ran = 0
        self.error: Exception | None = None

    def __call__(
        self, module: nn.Module, executable: Callable[..., tuple[Tensor, ...]], args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        if self.error is not None:
            raise self.error
        self.ran += 1
        scale = kwargs.get("scale", args[1] if len(args) > 1 else 1.0)
        (y,) = executable(args[0])
        return y * scale, scale, torch.arange(3)


def store(module: nn.Module) -> WeightStore:
    return WeightStore(module, {"w": View("inner.weight", 0, (D, D), (D, 1)), "b": View("inner.bias", 0, (D,), (1,))})


def build(weights: WeightStore) -> Callable[..., tuple[Tensor, ...]]:
    return lambda x: (torch.tanh(nn.functional.linear(x, weights.dense("w"), weights.dense("b"))),)


class Installed:
    def __init__(self, *, strict: bool = False) -> None:
        self.module, self.call = Layer().eval(), Call()
        self.report = LayerReport(name="mlp", kind="moe", status="compiled")
        self.method = CompiledMethod(self.module, "forward", self.call, store, build, self.report, ("inner",), strict)
        self.method.ready()
        install(self.method)

    def ran(self) -> tuple[int, int]:
        """(compiled, original) calls"""
        return self.call.ran, self.module.ran


@pytest.fixture
def layer() -> Installed:
    return Installed()


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


X = rand(3, D)


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


def test_a_copy_of_the_module_is_compiled_on_its_own_weights(layer: Installed) -> None:
    twin = copy.deepcopy(layer.module)
    (method,) = installed(twin)
    assert method.module is twin
    with torch.no_grad():
        twin.inner.weight.zero_()
        twin.inner.bias.fill_(0.5)
        torch.testing.assert_close(twin(X)[0], torch.full((3, D), 0.5).tanh())
        assert not torch.allclose(layer.module(X)[0], torch.full((3, D), 0.5).tanh())
    assert layer.call.ran == 2


def replace_module(module: Any) -> None:
    module.inner = nn.Linear(D, D)


class Shifted(nn.Linear):
    """The same weights in the same places, another function."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def replace_by_another_kind(module: Any) -> None:
    module.inner = Shifted(D, D)


def change_strides(module: Any) -> None:
    module.inner.weight = nn.Parameter(module.inner.weight.detach().t().contiguous().t())


@pytest.mark.parametrize("change", [replace_module, change_strides])
def test_a_layer_whose_weights_moved_falls_back(layer: Installed, change: Callable[[Any], None]) -> None:
    change(layer.module)
    assert layer.method.moved() != ""
    with pytest.warns(FallbackWarning):
        got = layer.module(X)[0]
    torch.testing.assert_close(got, layer.method.original(X)[0])


@pytest.mark.parametrize("change", [replace_module, change_strides])
def test_and_so_does_a_copy_of_it(layer: Installed, change: Callable[[Any], None]) -> None:
    change(layer.module)
    twin = copy.deepcopy(layer.module)
    with pytest.warns(FallbackWarning):
        twin(X)
    assert twin.ran == 1
    again = copy.deepcopy(twin)
    again(X)
    assert again.ran == 2


@pytest.mark.parametrize("change", [replace_by_another_kind, change_strides])
def test_a_copy_that_is_changed_before_its_first_call_falls_back(
    layer: Installed, change: Callable[[Any], None]
) -> None:
    for twin in (copy.deepcopy(layer.module), copy.deepcopy(copy.deepcopy(layer.module))):
        change(twin)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.testing.assert_close(twin(X)[0], twin.inner(X).tanh())
        assert twin.ran == 1


def test_writes_are_no_moves(layer: Installed) -> None:
    layer.module.double()
    layer.module.load_state_dict(Layer().state_dict())
    assert layer.method.moved() == ""


def test_a_hook_on_a_copy_blocks_the_copy_alone(layer: Installed) -> None:
    twin = copy.deepcopy(layer.module)
    twin.inner.register_forward_hook(lambda *args: None)
    layer.module(X)
    assert layer.ran() == (1, 0)
    with pytest.warns(FallbackWarning):
        twin(X)


def test_the_method_alone_cannot_be_copied(layer: Installed) -> None:
    with pytest.raises(MoecError) as raised:
        copy.deepcopy(layer.method)
    assert raised.value.code == "MOEC232"


def test_a_pickle_has_the_original_code(layer: Installed) -> None:
    loaded = pickle.loads(pickle.dumps(layer.module))
    assert installed(loaded) == []
    with torch.no_grad():
        torch.testing.assert_close(loaded(X)[0], layer.module(X)[0])
    assert loaded.ran == 1


def test_an_unpickled_module_is_plain_again(layer: Installed) -> None:
    loaded = pickle.loads(pickle.dumps(layer.module))
    loaded.inner.forward = own = lambda x: x
    drop_own_methods(loaded)
    assert "forward" not in loaded.__dict__
    assert loaded.inner.__dict__["forward"] is own


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
