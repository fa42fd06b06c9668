"""The sliced cut: the block's own operations stay and run at any size, or the reason why they cannot.

B sequences, S positions, T tokens, K experts per token, E experts, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moec.frontends.torch.calls import SlicedCall
from moec.frontends.torch.routing import Unusual
from tests.frontend_units.build import rand
from tests.frontend_units.layers import Block, D, E, Expert, Routed, evaluated, lifted, made, mix, refusal, top


def plain(m: Any, x: Tensor, logits: Tensor) -> Tensor:
    return mix(m.experts, x, *top(logits))


def scaled_after(m: Any, x: Tensor, logits: Tensor) -> Tensor:
    return torch.nan_to_num(plain(m, x, logits)) * 1.5 + x


def with_logits(m: Any, x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    return plain(m, x, logits).view(1, -1, D), logits


def normed(m: Any, x: Tensor, logits: Tensor) -> Tensor:
    return F.layer_norm(plain(m, F.layer_norm(x, (D,)), logits), (D,))


def batch_sized(m: Any, x: Tensor, logits: Tensor) -> Tensor:
    return plain(m, x, logits) / len(x)


BODIES: dict[str, Routed] = {
    "plain": plain,
    "residual": scaled_after,
    "logits returned": with_logits,
    "norms": normed,
    "divided by the number of tokens": batch_sized,
}


@pytest.mark.parametrize("how", BODIES)
def test_a_block_runs_at_sizes_not_seen(how: str) -> None:
    model = made(Block(BODIES[how]))
    layer = lifted(model)
    assert (layer.cut, layer.name) == ("slice", "mlp")
    assert isinstance(layer.call, SlicedCall)
    for shape in ((4, 13, D), (1, 1, D), (1, 40, D)):
        x = rand(*shape, seed=sum(shape)) * 3
        with torch.no_grad():
            torch.testing.assert_close(evaluated(layer, model, x), model(x))


def around(body: Routed) -> tuple[str, ...]:
    """What the slice of a block with this body runs, as the evidence says it too."""
    layer = lifted(made(Block(body)))
    assert isinstance(layer.call, SlicedCall)
    names = layer.call.sliced.around
    assert layer.evidence[-1].endswith(", ".join(names))
    return names


def test_the_program_says_what_runs_around_the_experts() -> None:
    text = around(scaled_after)
    at = text.index("experts")
    assert "topk" in text[:at]
    assert {"nan_to_num", "mul", "add"} <= set(text[at:])
    assert "topk" not in text[at:]
    assert "index_add_" not in text


def test_the_router_with_its_own_call_stays_a_call() -> None:
    text = around(plain)
    assert "call mlp.router" in text


def test_what_the_result_does_not_need_is_left_out() -> None:
    def with_statistics(m: Any, x: Tensor, logits: Tensor) -> Tensor:
        logits.exp().mean(0).std()
        return plain(m, x, logits)

    assert "std" not in around(with_statistics)


def test_buffers_and_parameters_around_the_experts_are_read_live() -> None:
    class Biased(Block):
        def __init__(self) -> None:
            super().__init__(lambda m, x, logits: mix(m.experts, x, *top(logits + m.bias)) * m.scale)
            self.register_buffer("bias", torch.zeros(E))
            self.scale = nn.Parameter(torch.ones(1))
            self.bias: Tensor

    block = Biased()
    model = made(block)
    layer = lifted(model)
    x = rand(2, 9, D)
    block.bias.copy_(torch.tensor([9.0, 0, 0, -9]))
    with torch.no_grad():
        block.scale.mul_(3)
        torch.testing.assert_close(evaluated(layer, model, x), model(x))


def different_operations(m: Any, x: Tensor, logits: Tensor) -> Tensor:
    y = plain(m, x, logits)
    return y.tanh() if len(x) > 30 else y


def no_size(m: Any, x: Tensor, logits: Tensor) -> Tensor:
    return plain(m, x, logits) + x[: int(len(x) ** 0.5)].sum(0)


def branch_on_values(m: Any, x: Tensor, logits: Tensor) -> Tensor:
    return plain(m, x, logits) if logits.max().item() < 1e9 else x


def branch_on_count(m: Any, x: Tensor, logits: Tensor) -> Tensor:
    return x if len((x.abs() > 1e9).nonzero()) else plain(m, x, logits)


def per_expert_effect(m: Any, x: Tensor, logits: Tensor) -> Tensor:
    m.last = logits.detach()
    return plain(m, x, logits)


def random_selection(m: Any, x: Tensor, logits: Tensor) -> Tensor:
    return plain(m, x, logits + torch.rand_like(logits))


def not_linear_in_experts(m: Any, x: Tensor, logits: Tensor) -> Tensor:
    index, weights = top(logits)
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        token, slot = torch.where(index == e)
        out.index_add_(0, token, expert(x[token]).tanh() * weights[token, slot, None])
    return out


def batch_mean_inside(m: Any, x: Tensor, logits: Tensor) -> Tensor:
    index, weights = top(logits)
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        token, slot = torch.where(index == e)
        h = expert.up(x[token])
        out.index_add_(0, token, expert.down(F.silu(h / 2 + h.mean(0) / 2)) * weights[token, slot, None])
    return out


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "other operations for more tokens": (different_operations, "different operations|at one shape is"),
    "a number that is no size": (no_size, "which is no size of the input"),
    "a branch on values": (branch_on_values, "on the host and may branch on it"),
    "a branch on how many values there are": (branch_on_count, "on the host and may branch on it"),
    "an attribute": (per_expert_effect, "sets attribute 'last'"),
    "random numbers": (random_selection, "draws random numbers"),
    "experts followed by tanh": (not_linear_in_experts, "no tensors x, experts, weights and y"),
    "a mean over the batch between the layers": (batch_mean_inside, "no tensors x, experts, weights and y|mean"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_sliced(what: str) -> None:
    body, expected = REFUSED[what]
    reason = refusal(made(Block(body)))
    assert any(part in reason for part in expected.split("|")), reason


class Kept(nn.Module):
    """A block that takes two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(E))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return mix(self.experts, x, *top(self.router(x))) * keep


class AroundKept(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.seen = Kept(), nn.Linear(D, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mlp(x, torch.sigmoid(self.seen(x)))
        return y


def test_a_block_that_takes_two_tensors() -> None:
    model = AroundKept().eval()
    layer = lifted(model)
    assert (layer.cut, layer.name) == ("slice", "mlp")
    x, keep = rand(17, D), rand(17, 1)
    with torch.no_grad():
        torch.testing.assert_close(evaluated(layer, model, x, keep), model.mlp(x, keep))


@pytest.mark.parametrize("keep", [torch.ones(16, 1), torch.ones(17, 1).double(), 1.0, torch.ones(17, 2)])
def test_another_second_tensor_than_verified_is_unusual(keep: Any) -> None:
    model = AroundKept().eval()
    layer = lifted(model)
    with pytest.raises(Unusual, match="argument keep"):
        evaluated(layer, model, rand(17, D), keep)


def test_a_hooked_submodule_stays_a_call() -> None:
    """The router's hook is the user's: it is called once for each call of the block."""
    block = Block(plain)
    model = made(block)
    layer = lifted(model)
    seen: list[tuple[int, ...]] = []
    block.router.register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape)))
    evaluated(layer, model, rand(2, 7, D))
    assert seen == [(14, E)]
