"""Models that other tools have had in hand, and modes of the process: adapters, wrappers, shared weights, threads.

B sequences, S tokens a sequence, D width, E experts.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moec
from tests.frontend.changing import D, Direct, E, Plain, Sliced, made
from tests.frontend.modules import told
from tests.frontend.test_callers import agrees

KINDS = [Sliced, Direct, Plain]
X = torch.randn(3, 5, D, generator=torch.Generator().manual_seed(2))


def only(model: Any) -> Any:
    (layer,) = model.moec.report.layers
    return layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_models_in_sixteen_bits(kind: type[nn.Module], dtype: torch.dtype) -> None:
    model = made(kind).to(dtype)
    fast = moec.compile(model, strict=True)
    exact = made(kind).to(dtype).float()(X.to(dtype).float())
    with torch.no_grad():
        mine, theirs = fast(X.to(dtype)), model(X.to(dtype))
    assert mine.dtype == dtype
    gap, own = ((y.float() - exact).norm() / exact.norm() for y in (mine, theirs))
    assert gap <= 1.5 * own + 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_compiling_under_autocast(kind: type[nn.Module]) -> None:
    """Layers are verified as they run without it; under it the original serves."""
    model = made(kind)
    with torch.autocast("cpu", torch.bfloat16):
        fast = moec.compile(model, strict=False)
    assert only(fast).compiled
    agrees(fast(X), model(X))
    assert only(fast).fallbacks == 0


def test_threads_that_compile_at_once() -> None:
    """Several models, and one model several times."""
    models = [made(KINDS[i % 3]) for i in range(4)]
    models += models[:2]
    found: dict[int, Any] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: moec.compile(models[i])})) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    for i, fast in found.items():
        assert only(fast).compiled, only(fast).reason
        agrees(fast(X), models[i](X))


class Twice(nn.Module):
    """One block at two places."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.block, self.norm = made(kind), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(self.norm(self.block(x)))
        return y


@pytest.mark.parametrize("example", [None, (X,)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_that_is_called_twice(kind: type[nn.Module], example: Any) -> None:
    model = Twice(kind).eval()
    fast = moec.compile(model, example_inputs=example, strict=True)
    agrees(fast(X), model(X))
    assert only(fast).fallbacks == 0


class Shared(nn.Module):
    """Two blocks with routers of their own over the same experts."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = made(Sliced), made(Sliced)
        self.b.experts = self.a.experts

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x) + self.b(x / 2)
        return y


def test_experts_that_two_blocks_share() -> None:
    model = Shared().eval()
    fast = moec.compile(model)
    assert any(layer.compiled for layer in fast.moec.report.layers)
    with torch.no_grad():
        agrees(fast(X), model(X))
        model.a.experts[0].up.weight.mul_(2)
        agrees(fast(X), model(X))
    assert all(layer.fallbacks == 0 for layer in fast.moec.report.layers)


def test_a_router_tied_to_another_layer() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = made(Sliced), nn.Linear(D, E, bias=False)
            self.head.weight = self.block.router.weight

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.block(x) + self.head(x).sum(-1, keepdim=True)
            return y

    model = Tied().eval()
    fast = moec.compile(model, strict=True)
    assert fast.head.weight is fast.block.router.weight
    with torch.no_grad():
        model.head.weight.mul_(3)
    agrees(fast(X), model(X))


def test_experts_that_share_weights_are_refused() -> None:
    model = made(Sliced)
    for expert in model.experts[1:]:
        expert.up.weight = model.experts[0].up.weight
    fast = moec.compile(model)
    assert "share" in only(fast).reason
    agrees(fast(X), model(X))


class Adapter(nn.Module):
    """A low-rank adapter around a layer, as tools for fine-tuning put them there."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base
        self.a = nn.Linear(base.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base.out_features, bias=False)
        self.scaling, self.disable_adapters = 0.5, False

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        return y if self.disable_adapters else y + self.b(self.a(x)) * self.scaling


def test_an_adapter_on_the_router() -> None:
    model = made(Sliced)
    model.router = Adapter(model.router)
    fast = moec.compile(model.eval(), strict=True)
    for switched in (False, True):
        for m in (fast, model):
            m.router.disable_adapters = switched
        with torch.no_grad():
            agrees(fast(X), model(X))
            model.router.a.weight.mul_(2)
            agrees(fast(X), model(X))


def test_adapters_on_experts_are_left_alone() -> None:
    model = made(Sliced)
    for expert in model.experts:
        expert.up, expert.down = Adapter(expert.up), Adapter(expert.down)
    fast = moec.compile(model.eval())
    assert any("experts" in note and "6 matrices" in note for note in fast.moec.report.notes), fast.moec.report.notes
    agrees(fast(X), model(X))


def test_adapters_put_on_experts_later() -> None:
    model = made(Sliced)
    fast = moec.compile(model)
    fast.experts[1].up = Adapter(fast.experts[1].up)
    model.experts[1].up = fast.experts[1].up
    with told() as texts:
        agrees(fast(X), model(X))
    assert any("MOEC231" in text for text in texts)


def hooked(module: Any) -> None:
    """As tools for offloading do it: a wrapper in the place of the instance's forward."""
    old = module.forward
    module._old_forward = old

    def new_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        return module._old_forward(*args, **kwargs)

    module.forward = functools.update_wrapper(functools.partial(new_forward, module), old)


PLACES: dict[str, Callable[[Any], nn.Module]] = {
    "the model": lambda m: m,
    "router": lambda m: m.router,
    "experts.1": lambda m: m.experts[1],
}


@pytest.mark.parametrize("place", PLACES)
def test_wrapped_before_compiling(place: str) -> None:
    model = made(Sliced)
    hooked(PLACES[place](model))
    fast = moec.compile(model)
    assert f"{place} has its forward overridden already" in only(fast).reason
    agrees(fast(X), model(X))


def test_wrapped_experts_of_a_call_of_their_own() -> None:
    model = made(Direct)
    hooked(model.experts)
    fast = moec.compile(model)
    assert "experts has its forward overridden already" in only(fast).reason
    agrees(fast(X), model(X))


@pytest.mark.parametrize("place", PLACES)
def test_wrapped_after_compiling(place: str) -> None:
    """A wrapper round the whole layer, or round what stays a call, wraps the compiled one; others fall back."""
    model = made(Sliced)
    fast = moec.compile(model)
    hooked(PLACES[place](fast))
    with told() as texts:
        agrees(fast(X), model(X))
    assert only(fast).fallbacks == (place == "experts.1")
    assert bool(texts) == (place == "experts.1")


class Printing(Sliced):
    def forward(self, x: Tensor) -> Tensor:
        print("called")
        return super().forward(x)


def test_printing_is_a_side_effect(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(3)
    model = Printing().eval()
    fast = moec.compile(model)
    assert "prints to standard output" in only(fast).reason
    assert "called" not in capsys.readouterr().out
    fast(X)
    assert capsys.readouterr().out == "called\n"


class Particular(Sliced):
    def forward(self, x: Tensor) -> Tensor:
        if len(x) != 3:
            raise ValueError("three sequences, please")
        return super().forward(x)


def test_an_error_of_the_users_code_is_told_with_its_line() -> None:
    torch.manual_seed(3)
    model = Particular().eval()
    fast = moec.compile(model)
    assert "ValueError: three sequences, please (test_other_tools.py:" in only(fast).reason
    assert "in forward" in only(fast).reason
    agrees(fast(X), model(X))
