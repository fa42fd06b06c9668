"""Gradients, autocast and other modes of torch in which the compiled module is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moec
from tests.corpus import CASES
from tests.frontend.compare import relative, tensors
from tests.frontend.modules import FEW, compiled, first, out, tokens, told
from tests.frontend.observed import example

NAMES = (*FEW, "effects.detached_gate", "effects.straight_through", "weights.on_input", "selection.bias_only")


def gradients(module: nn.Module, args: tuple[Any, ...]) -> dict[str, Tensor]:
    """Gradients of a quadratic loss for the input and each parameter that gets one."""
    module.zero_grad(set_to_none=True)
    x = args[0].detach().clone().requires_grad_()
    torch.manual_seed(4)
    results = [leaf for leaf in tensors(module(x, *args[1:])) if leaf.is_floating_point()]
    torch.stack([leaf.square().sum() for leaf in results]).sum().backward()
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    assert x.grad is not None
    return {"input": x.grad, **found}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_the_originals(name: str, training: bool) -> None:
    module = CASES[name].make()
    fast = moec.compile(module, example_inputs=example(CASES[name]))
    want = gradients(module.train(training), tokens(name))
    with told():
        got = gradients(fast.train(training), tokens(name))
    assert got.keys() == want.keys()
    for key, gradient in want.items():
        if training:
            assert torch.equal(got[key], gradient), key
        else:
            assert max(relative(got[key], gradient)) < 1e-5, key


@pytest.mark.parametrize("name", FEW)
def test_whether_a_result_requires_a_gradient(name: str) -> None:
    module, fast = compiled(name)
    with told():
        assert tensors(fast(*tokens(name)))[0].requires_grad
        assert tensors(fast(*tokens(name)))[0].grad_fn is not None
    fast.requires_grad_(False)
    assert not tensors(fast(*tokens(name)))[0].requires_grad
    with torch.no_grad():
        assert not tensors(fast(*tokens(name)))[0].requires_grad
    assert not any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("name", FEW)
def test_frozen_weights_and_a_learned_input(name: str) -> None:
    """Prompt tuning: only the input requires a gradient."""
    module, fast = compiled(name)
    module.requires_grad_(False)
    want = gradients(module, tokens(name))
    with told():
        got = gradients(fast, tokens(name))
    assert list(got) == list(want) == ["input"]
    assert max(relative(got["input"], want["input"])) < 1e-5


@pytest.mark.parametrize("name", FEW)
def test_autocast_is_the_originals(name: str) -> None:
    """Under autocast the original computes in bfloat16: the same dtype, and no worse."""
    module, fast = compiled(name)
    args = tokens(name, 130)
    exact = first(module, args)
    with torch.autocast("cpu", torch.bfloat16), told():
        if out(module, args).error:
            pytest.skip("the original itself raises under autocast")
        want, got = first(module, args), first(fast, args)
    assert got.dtype == want.dtype
    assert relative(got, exact)[0] <= 1.5 * relative(want, exact)[0]


@pytest.mark.parametrize("name", FEW)
def test_inference_mode(name: str) -> None:
    module, fast = compiled(name)
    with torch.inference_mode():
        got = tensors(fast(*tokens(name)))[0]
        want = tensors(module(*tokens(name)))[0]
    assert got.is_inference()
    assert max(relative(got, want)) < 2e-6


@pytest.mark.parametrize("name", FEW)
def test_other_dtypes_of_input(name: str) -> None:
    """A float64 or bfloat16 input into a float32 model: what the original does, an error included."""
    module, fast = compiled(name)
    for dtype in (torch.float64, torch.bfloat16):
        args = tuple(a.to(dtype) if a.is_floating_point() else a for a in tokens(name))
        outcomes: list[Any] = []
        for one in (module, fast):
            try:
                with told(), torch.no_grad():
                    outcomes.append(tensors(one(*args))[0].dtype)
            except RuntimeError as error:
                outcomes.append(type(error))
        assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("name", FEW)
def test_no_tokens_at_all(name: str) -> None:
    """T = 0: the same empty result, or the same error."""
    module, fast = compiled(name)
    x = tokens(name)[0]
    empty = (x[:0] if x.dim() == 2 else x[:, :0],)
    outcomes = []
    for one in (module, fast):
        try:
            with told(), torch.no_grad():
                outcomes.append(str(tensors(one(*empty))[0].shape))
        except Exception as error:
            outcomes.append(type(error).__name__)
    assert outcomes[0] == outcomes[1]
