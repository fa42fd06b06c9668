"""Blocks composed at random from pieces: style, sizes, score, selection, normalisation, a twist, an epilogue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.corpus.blocks import STYLES
from tests.corpus.case import fill
from tests.corpus.inlined import without_methods

SCORES = ("softmax", "sigmoid", "raw", "softplus")
BIASES = ("none", "selection", "logits")
PICKS = ("top", "bottom", "groups", "rolled")
NORMALISATIONS = ("none", "sum", "eps", "softmax", "l2", "scaled")
TWISTS = ("none", "none", "clamp", "negated expert", "gain on input", "bf16 inside", "scaled slot")
EPILOGUES = ("none", "residual", "norm", "tuple", "half", "token gate")


@dataclass(frozen=True)
class Recipe:
    """What one composed block does."""

    style: str
    body: str
    experts: int
    top_k: int
    dim: int
    hidden: int
    score: str
    bias: str
    pick: str
    normalise: str
    twist: str
    epilogue: str
    inline: bool
    seed: int


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    experts = draw(st.sampled_from([2, 3, 4, 6, 8, 12]))
    pick = draw(st.sampled_from(PICKS))
    most = experts if pick != "groups" or experts % 2 else max(1, experts // 2)
    return Recipe(
        style=draw(st.sampled_from(sorted(STYLES))),
        body=draw(st.sampled_from(["swiglu", "gelu", "relu"])),
        experts=experts,
        top_k=draw(st.integers(1, min(4, most))),
        dim=draw(st.sampled_from([6, 8, 13, 16])),
        hidden=draw(st.sampled_from([5, 8, 16, 21])),
        score=draw(st.sampled_from(SCORES)),
        bias=draw(st.sampled_from(BIASES)),
        pick=pick,
        normalise=draw(st.sampled_from(NORMALISATIONS)),
        twist=draw(st.sampled_from(TWISTS)),
        epilogue=draw(st.sampled_from(EPILOGUES)),
        inline=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


def build(recipe: Recipe) -> nn.Module:
    """The block of a recipe, in eval mode."""
    style = STYLES[recipe.style]

    def route(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return composed_route(self, x, recipe)

    def mix(self: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        if recipe.twist == "scaled slot":
            weights = weights * torch.linspace(1.0, 0.5, recipe.top_k, dtype=x.dtype)
        if recipe.twist == "gain on input":
            x = x * 1.5
        return style.mix(self, x, weights, ids)

    def expert(self: Any, e: int, rows: Tensor) -> Tensor:
        if recipe.twist == "bf16 inside":
            rows = rows.bfloat16().float()
        y: Tensor = style.expert(self, e, rows)  # type: ignore[attr-defined]
        if recipe.twist == "clamp":
            return y.clamp(-40.0, 40.0)
        return -y if recipe.twist == "negated expert" and e == recipe.experts - 1 else y

    def forward(self: Any, x: Tensor) -> Any:
        return epilogue(self, x, style.forward(self, x), recipe.epilogue)

    parts: dict[str, Any] = {"route": route, "mix": mix, "forward": forward}
    if hasattr(style, "expert"):
        parts["expert"] = expert
    block = type("Composed", (style,), parts)
    module: nn.Module = block(
        dim=recipe.dim, hidden=recipe.hidden, experts=recipe.experts, top_k=recipe.top_k, body=recipe.body
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    module.register_buffer("correction", 0.3 * torch.randn(recipe.experts, generator=generator))
    module.register_parameter("gain", nn.Parameter(torch.empty(recipe.dim)))
    fill(module, recipe.seed)
    if recipe.inline:
        module.__class__ = without_methods(type(module))
    return module.eval()


def composed_route(self: Any, x: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    logits = self.router(x)
    if recipe.bias == "logits":
        logits = logits + self.correction
    score = {
        "softmax": lambda: logits.softmax(-1),
        "sigmoid": logits.sigmoid,
        "raw": lambda: logits,
        "softplus": lambda: nn.functional.softplus(logits),
    }[recipe.score]()
    ranked = score + self.correction if recipe.bias == "selection" else score
    if recipe.pick == "groups" and recipe.experts % 2 == 0:
        groups = ranked.view(-1, 2, recipe.experts // 2)
        best = groups.amax(-1).argmax(-1)
        kept = nn.functional.one_hot(best, 2).bool().repeat_interleave(recipe.experts // 2, 1)
        ranked = ranked.masked_fill(~kept, float("-inf"))
    ids = ranked.topk(recipe.top_k, largest=recipe.pick != "bottom").indices
    weights = normalised(score.gather(1, ids), recipe.normalise)
    return weights, ((ids + 1) % recipe.experts if recipe.pick == "rolled" else ids)


def normalised(weights: Tensor, how: str) -> Tensor:
    if how == "sum":
        return weights / weights.abs().sum(-1, keepdim=True)
    if how == "eps":
        return weights / (weights.abs().sum(-1, keepdim=True) + 0.05)
    if how == "softmax":
        return weights.softmax(-1)
    if how == "l2":
        return nn.functional.normalize(weights, dim=-1)
    return weights * 2.5 if how == "scaled" else weights


def epilogue(self: Any, x: Tensor, y: Tensor, how: str) -> Any:
    if how == "residual":
        return x + y
    if how == "norm":
        return nn.functional.rms_norm(y, (y.shape[-1],), self.gain, 0.1)
    if how == "tuple":
        return y, self.router(x)
    if how == "half":
        return y * 0.5
    return y * torch.sigmoid((x * self.gain).sum(-1, keepdim=True)) if how == "token gate" else y
