"""The lowest cut: which argument of a call is x, which the selector, which the weights, in every convention.

T tokens, K experts per token, E experts, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moec.frontends.torch.calls import DirectCall
from moec.frontends.torch.direct import Roles
from moec.frontends.torch.routing import Unusual
from tests.frontend_units.build import rand
from tests.frontend_units.layers import Block, D, E, Inner, K, evaluated, lifted, made, mix, refusal, top


def indices(experts: nn.ModuleList, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    return mix(experts, x, index, weights)


def masked(experts: nn.ModuleList, x: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    return mix(experts, x, mask.argmax(-1), weights)


def dense(experts: nn.ModuleList, x: Tensor, gates: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(experts):
        (token,) = torch.where(gates[:, e] != 0)
        out[token] += expert(x[token]) * gates[token, e, None]
    return out


def unit(experts: nn.ModuleList, x: Tensor, index: Tensor) -> Tensor:
    return mix(experts, x, index, torch.ones(index.shape))


def on_input(experts: nn.ModuleList, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(experts):
        token, slot = torch.where(index == e)
        out.index_add_(0, token, expert(x[token] * weights[token, slot, None]))
    return out


def scaled(experts: nn.ModuleList, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    return mix(experts, x, index, weights) * 0.8


def gates(index: Tensor, weights: Tensor) -> Tensor:
    return torch.zeros(len(index), E).scatter(1, index, weights)


def by_name(experts: nn.ModuleList, x: Tensor, *, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    return mix(experts, x, top_k_index, top_k_weights)


CASES: dict[str, tuple[Callable[..., Any], Callable[..., Any], Roles]] = {
    "indices": (indices, lambda m, x, i, w: m.inner(x, i, w), Roles("x", "*0", "*1", "indices", False, K)),
    "weights first": (
        lambda experts, x, weights, index: mix(experts, x, index, weights),
        lambda m, x, i, w: m.inner(x, w, i),
        Roles("x", "*1", "*0", "indices", False, K),
    ),
    "by name": (
        by_name,
        lambda m, x, i, w: m.inner(x, top_k_weights=w, top_k_index=i),
        Roles("x", "top_k_index", "top_k_weights", "indices", False, K),
    ),
    "mask": (
        masked,
        lambda m, x, i, w: m.inner(x, F.one_hot(i, E), w),
        Roles("x", "*0", "*1", "mask", False, K),
    ),
    "dense": (dense, lambda m, x, i, w: m.inner(x, gates(i, w)), Roles("x", None, "*0", "dense", False, K)),
    "unit": (unit, lambda m, x, i, w: m.inner(x, i[:, :1]) * w[:, :1], Roles("x", "*0", None, "unit", False, 1)),
    "scaled": (scaled, lambda m, x, i, w: m.inner(x, i, w), Roles("x", "*0", "*1", "indices", False, K, 0.8)),
    "on the input": (on_input, lambda m, x, i, w: m.inner(x, i, w), Roles("x", "*0", "*1", "indices", True, K)),
}


@pytest.mark.parametrize("how", CASES)
def test_roles_of_the_arguments(how: str) -> None:
    takes, gives, expected = CASES[how]
    model = made(Block(lambda m, x, logits: gives(m, x, *top(logits)), Inner(takes)))
    layer = lifted(model)
    assert (layer.cut, layer.kind, layer.name, layer.method) == ("submodule", "moe", "mlp.inner", "forward")
    assert isinstance(layer.call, DirectCall)
    assert layer.call.roles == expected
    assert f"routing given as {expected.form}" in layer.evidence[0]


@pytest.mark.parametrize("how", CASES)
def test_the_call_gives_what_the_original_gives(how: str) -> None:
    takes, gives, _ = CASES[how]
    model = made(Block(lambda m, x, logits: gives(m, x, *top(logits)), Inner(takes)))
    layer = lifted(model)
    inner = layer.module
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    inner.register_forward_pre_hook(lambda m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        model(rand(3, 5, D, seed=3))
        args, kwargs = seen[0]
        torch.testing.assert_close(evaluated(layer, model, *args, **kwargs), inner(*args, **kwargs))


def test_other_values_of_other_arguments_are_unusual() -> None:
    def scaled(experts: nn.ModuleList, x: Tensor, index: Tensor, weights: Tensor, scale: float = 1.0) -> Tensor:
        return mix(experts, x, index, weights) * scale

    model = made(Block(lambda m, x, logits: m.inner(x, *top(logits)), Inner(scaled)))
    layer = lifted(model)
    index, weights = top(rand(5, E))
    evaluated(layer, model, rand(5, D), index, weights)
    with pytest.raises(Unusual, match="other arguments than those verified"):
        evaluated(layer, model, rand(5, D), index, weights, scale=2.0)
    with pytest.raises(Unusual, match="has 3 dimensions, it was verified with 2"):
        evaluated(layer, model, rand(1, 5, D), index, weights)
    with pytest.raises(Unusual, match=r"torch.float64, the layer was compiled for torch.float32"):
        evaluated(layer, model, rand(5, D).double(), index, weights)
    with pytest.raises(Unusual, match="wide, not 6"):
        evaluated(layer, model, rand(5, D + 1), index, weights)
    with pytest.raises(Unusual, match="not given as tensors"):
        evaluated(layer, model, rand(5, D), None, weights)


def test_a_call_that_reads_a_tensor_without_a_role_is_not_cut_there() -> None:
    """A mask of ones changes nothing on the probe, and something on another day."""

    def with_mask(experts: nn.ModuleList, x: Tensor, index: Tensor, weights: Tensor, keep: Tensor) -> Tensor:
        return mix(experts, x, index, weights) * keep

    model = made(Block(lambda m, x, logits: m.inner(x, *top(logits), torch.ones(len(x), 1)), Inner(with_mask)))
    layer = lifted(model)
    assert (layer.cut, layer.name) == ("slice", "mlp")


BRANCHES: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "a value of x": lambda x, index, weights: x.abs().max().item() > 1e9,
    "how many values of x are large": lambda x, index, weights: len((x.abs() > 1e9).nonzero()),
    "how many rows are large": lambda x, index, weights: len(x[x.abs().amax(-1) > 1e9]),
    "a weight": lambda x, index, weights: bool((weights > 2).any()),
    "how many weights are large": lambda x, index, weights: len(torch.where(weights > 2)[0]),
}


@pytest.mark.parametrize("what", BRANCHES)
def test_a_call_that_may_branch_on_values_is_refused(what: str) -> None:
    def guarded(experts: nn.ModuleList, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        if BRANCHES[what](x, index, weights):
            return x
        return mix(experts, x, index, weights)

    reason = refusal(made(Block(lambda m, x, logits: m.inner(x, *top(logits)), Inner(guarded))))
    assert "reads a value computed from its input on the host and may branch on it" in reason


def test_experts_with_an_effect_are_refused() -> None:
    class Counting(Inner):
        def forward(self, x: Tensor, *routing: Any, **named: Any) -> Tensor:
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(x, *routing, **named)

    reason = refusal(made(Block(lambda m, x, logits: m.inner(x, *top(logits)), Counting(indices))))
    assert "sets attribute 'calls'" in reason
