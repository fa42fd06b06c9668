"""Models compiled for training: gradients by kernels where they are the model's own, and by the original elsewhere."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("triton")

import moec
from moec.report import LayerReport
from tests.corpus import CASES
from tests.frontend.compare import relative, tensors
from tests.frontend.modules import FEW, tokens
from tests.frontend.observed import example
from tests.frontend.test_training_mode import Block, D, Ffn

BY_KERNELS, BY_ORIGINAL = "gradients by kernels", "gradients by running the original again"


def how(layer: LayerReport) -> str:
    """What the report says of a layer's gradients."""
    (line,) = (line for line in layer.evidence if line.startswith("gradients by"))
    return line


def compiled(model: nn.Module, **options: Any) -> Any:
    return moec.compile(model.eval(), backend="triton", training=True, **options)


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, Any]:
    """A mixture and its compiled twin, on which compiling is spent once; the interpreter takes its time."""
    torch.manual_seed(0)
    model = Block().to("cuda" if torch.cuda.is_available() else "cpu")
    return model, compiled(model)


def step(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor | None]:
    """The result of a training step, and all gradients."""
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = model(x)
    y.square().sum().backward()
    found = [y.detach(), x.grad, *(None if p.grad is None else p.grad.clone() for p in model.parameters())]
    model.zero_grad(set_to_none=True)
    return found


def assert_same(mine: list[torch.Tensor | None], theirs: list[torch.Tensor | None], bar: float = 1e-5) -> None:
    assert [g is None for g in mine] == [g is None for g in theirs]
    for a, b in zip(mine, theirs, strict=True):
        assert a is None or b is None or max(relative(a, b)) < bar


def test_a_step_is_the_originals(pair: tuple[nn.Module, Any], device: torch.device) -> None:
    model, fast = pair
    assert_steps(model, fast, device)


@pytest.mark.slow
def test_a_step_of_an_ffn(device: torch.device) -> None:
    model = Ffn().to(device)
    assert_steps(model, compiled(model), device)


def assert_steps(model: nn.Module, fast: Any, device: torch.device) -> None:
    (layer,) = fast.moec.report.layers
    assert how(layer).startswith(BY_KERNELS)
    for count in (1, 9):
        x = torch.randn(count, D, device=device)
        for training in (True, False):
            assert_same(step(fast.train(training), x), step(model.train(training), x))
    assert layer.fallbacks == 0


@pytest.mark.slow
def test_without_the_option_the_original_runs_again(device: torch.device) -> None:
    fast = moec.compile(Block().eval().to(device), backend="triton")
    (layer,) = fast.moec.report.layers
    assert not any(line.startswith("gradients by") for line in layer.evidence)


NAMES = (*FEW, "effects.detached_gate", "effects.straight_through", "weights.on_input", "selection.bias_only")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_any_layer_are_the_originals(name: str, device: torch.device) -> None:
    module = CASES[name].make().to(device)
    args = tuple(a.to(device) for a in tokens(name))
    fast = compiled(module, example_inputs=tuple(a.to(device) for a in example(CASES[name]) or ()) or None)

    def gradients(one: nn.Module) -> dict[str, torch.Tensor]:
        one.zero_grad(set_to_none=True)
        x = args[0].detach().clone().requires_grad_()
        results = [leaf for leaf in tensors(one(x, *args[1:])) if leaf.is_floating_point()]
        torch.stack([leaf.square().sum() for leaf in results]).sum().backward()
        assert x.grad is not None
        found = {"": x.grad, **{n: p.grad for n, p in one.named_parameters() if p.grad is not None}}
        one.zero_grad(set_to_none=True)
        return found

    mine, theirs = gradients(fast), gradients(module)
    assert mine.keys() == theirs.keys()
    for key, gradient in theirs.items():
        assert max(relative(mine[key], gradient)) < 1e-5, key


class Detached(Block):
    """Its routing weights are no part of the graph, which shows in gradients alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.logits(x).softmax(-1).topk(2, dim=-1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, choice = (ids == e).nonzero(as_tuple=True)
            if token.numel():
                kept = expert(x[token]) * weights[token, choice, None].detach()
                y.index_add_(0, token, kept)
        return y


@pytest.mark.slow
def test_a_gradient_that_the_experts_do_not_pass_on(device: torch.device) -> None:
    model = Detached().to(device)
    fast = compiled(model)
    x = torch.randn(7, D, device=device)
    assert_same(step(fast, x), step(model, x))
    (layer,) = fast.moec.report.layers
    assert how(layer).startswith(BY_ORIGINAL)


def test_it_learns_as_the_original_does(pair: tuple[Any, Any], device: torch.device) -> None:
    twin, fast = (copy.deepcopy(one).train() for one in pair)
    x, wanted = torch.randn(32, D, device=device), torch.randn(32, D, device=device)
    losses = []
    for one in (fast, twin):
        optimizer = torch.optim.AdamW(one.parameters(), lr=0.01)
        for _ in range(5):
            optimizer.zero_grad()
            loss = F.mse_loss(one(x), wanted)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert fast.moec.report.layers[0].fallbacks == 0


def test_a_copy_has_gradients_of_its_own(pair: tuple[nn.Module, Any], device: torch.device) -> None:
    model, fast = pair
    x = torch.randn(7, D, device=device)
    step(fast, x)
    other = copy.deepcopy(fast)
    assert_same(step(other, x), step(model, x))
    assert all(p.grad is None for p in fast.parameters())


def test_gradients_of_gradients(pair: tuple[nn.Module, Any], device: torch.device) -> None:
    model, fast = pair
    x = torch.randn(5, D, device=device)
    found = []
    for one in (fast, model):
        given = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(one(given).square().sum(), [given], create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [given, *one.parameters()], allow_unused=True))
    assert_same(list(found[0]), list(found[1]), 1e-4)


def test_what_the_backends_say_that_compute_none() -> None:
    fast = moec.compile(Block().eval(), backend="reference", training=True)
    assert how(fast.moec.report.layers[0]) == f"{BY_ORIGINAL}: back end reference computes none"
