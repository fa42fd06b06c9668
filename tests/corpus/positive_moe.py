"""MoE blocks that must compile: every style with every body, router variants, odd sizes, epilogues."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.corpus.blocks import STYLES, Gathered, GeluMlp, LoopList, Moe, Sorted, Swiglu
from tests.corpus.case import CASES, Case, case


def add(name: str, why: str, build: Callable[[], nn.Module], **fields: Any) -> None:
    fields.setdefault("dim", 16)
    CASES.add(Case(name=name, why=why, build=build, expect="compiled", tags=frozenset({"positive"}), **fields))


for style, block in STYLES.items():
    for body in ("swiglu", "gelu", "relu"):
        why = f"the {style} style with {body} experts"
        add(f"{style}.{body}", why, partial(block, body=body))

SIZES = {
    "e2_k1": {"experts": 2, "top_k": 1},
    "e3_k3": {"experts": 3, "top_k": 3},
    "e5_k4_odd": {"experts": 5, "top_k": 4, "dim": 13, "hidden": 7},
    "e64_k4": {"experts": 64, "top_k": 4, "dim": 24, "hidden": 9},
    "e6_k1_wide": {"experts": 6, "top_k": 1, "dim": 33, "hidden": 65},
    "square": {"experts": 8, "top_k": 2, "dim": 8, "hidden": 8},  # E = D = F: a shape says nothing about its axis
}
for size, arguments in SIZES.items():
    for style in ("loop_list", "loop_stacked", "sorted", "gathered", "dense_all"):
        if size not in {"square", "e5_k4_odd"} and style not in {"loop_list", "gathered"}:
            continue
        build = partial(STYLES[style], **arguments)  # type: ignore[arg-type]
        # One expert a token, renormalised: every weight is one, so that sliced code does not show where it acts.
        inline: Any = {"inline_expect": "either"} if arguments["top_k"] == 1 else {}
        add(f"{style}.{size}", f"{style} at sizes {arguments}", build, dim=arguments.get("dim", 16), **inline)

TINY = {
    "e1_k1": {"experts": 1, "top_k": 1},  # a dense FFN in an expert's clothes
    "f1": {"hidden": 1},
    "d1": {"dim": 1, "hidden": 6},
    "k8_of_8": {"experts": 8, "top_k": 8},
}
for size, arguments in TINY.items():
    for style in ("loop_list", "gathered", "sorted"):
        build = partial(STYLES[style], **arguments)  # type: ignore[arg-type]
        tiny = Case(
            name=f"{style}.{size}",
            why=f"{style} at the sizes {arguments}: an axis of one, or no choice",
            build=build,
            dim=arguments.get("dim", 16),
            min_experts=min(2, arguments.get("experts", 8)),
            others=1,
            bar=2e-5 if arguments.get("hidden") == 1 else 2e-6,  # F = 1: one rounded number decides a whole row
            unseen=arguments.get("experts") == 1,
        )
        CASES.add(tiny)


def with_router(style: str, route: Callable[[Any, Tensor], tuple[Tensor, Tensor]], **buffers: float) -> nn.Module:
    """The style's block with another router; `buffers` are [E] corrections of that standard deviation."""
    block = type(f"{STYLES[style].__name__}Routed", (STYLES[style],), {"route": route})
    module: nn.Module = block(experts=8, top_k=2)
    for name, deviation in buffers.items():
        module.register_buffer(name, torch.randn(8) * deviation)
    return module


def topk_softmax(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    top, ids = self.router(x).topk(self.top_k, dim=-1)
    return F.softmax(top, dim=-1), ids


def softmax_topk(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = F.softmax(self.router(x), dim=-1, dtype=torch.float32).topk(self.top_k, dim=-1)
    return weights.to(x.dtype), ids


def sigmoid_bias(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    scores = self.router(x).sigmoid()
    ids = (scores + self.correction).topk(self.top_k, dim=-1, sorted=False).indices
    weights = scores.gather(1, ids)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5, ids


def noisy_in_training(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    logits = self.router(x)
    if self.training:
        logits = logits + torch.randn_like(logits) * 0.3
    top, ids = torch.topk(logits, self.top_k)
    return top.softmax(dim=1), ids


def group_limited(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    scores = self.router(x).sigmoid()
    biased = scores + self.correction
    by_group = biased.view(-1, 4, 2).topk(2, dim=-1).values.sum(-1)
    kept = torch.zeros_like(by_group).scatter_(1, by_group.topk(2, dim=-1).indices, 1.0)
    masked = biased.masked_fill(kept.repeat_interleave(2, dim=1) == 0, float("-inf"))
    ids = masked.topk(self.top_k, dim=-1).indices
    weights = scores.gather(1, ids)
    return weights / weights.sum(-1, keepdim=True), ids


ROUTERS: dict[str, tuple[Callable[[Any, Tensor], tuple[Tensor, Tensor]], dict[str, float]]] = {
    "topk_softmax": (topk_softmax, {}),
    "softmax_topk": (softmax_topk, {}),
    "sigmoid_bias": (sigmoid_bias, {"correction": 0.3}),
    "noisy_training": (noisy_in_training, {}),
    "group_limited": (group_limited, {"correction": 0.3}),
}
for router, (route, buffers) in ROUTERS.items():
    for style in ("loop_list", "sorted", "gathered"):
        add(f"{style}.{router}", f"{router} in front of {style}", partial(with_router, style, route, **buffers))


@case("tuple_out.loop", expect="compiled")
class TupleOutLoop(LoopList):
    """Returns (out, router logits), the logits for a loss outside."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        batch, tokens, dim = x.shape
        rows = x.view(-1, dim)
        logits = self.router(rows)
        weights, ids = F.softmax(logits, dim=1).topk(self.top_k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return self.mix(rows, weights, ids).view(batch, tokens, dim), logits


@case("tuple_out.sorted", expect="compiled")
class TupleOutSorted(Sorted):
    """Returns a nested tuple with everything the router knows."""

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        rows = x.flatten(0, -2)
        weights, ids = self.route(rows)
        return self.mix(rows, weights, ids).reshape(x.shape), (weights, ids)


@case("shared_expert.loop", expect="compiled", others=1)
class SharedExpert(LoopList):
    """A shared expert beside the routed ones, wider than they are."""

    def build_experts(self) -> None:
        super().build_experts()
        self.shared = Swiglu(self.dim, 2 * self.hidden)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x) + self.shared(x)
        return out


@case("shared_gate.sorted", expect="compiled", others=1)
class SharedGate(Sorted):
    """A shared expert scaled by a sigmoid gate of the token."""

    def build_experts(self) -> None:
        super().build_experts()
        self.shared = Swiglu(self.dim, self.hidden)
        self.shared_gate = nn.Linear(self.dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.dim)
        routed = self.mix(rows, *self.route(rows))
        result: Tensor = (routed + torch.sigmoid(self.shared_gate(rows)) * self.shared(rows)).view_as(x)
        return result


@case("residual.gathered", expect="compiled")
class Residual(Gathered):
    """Pre-norm and residual inside the block."""

    def build_experts(self) -> None:
        super().build_experts()
        self.norm = nn.LayerNorm(self.dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + super().forward(self.norm(x))
        return out


@case("tokens_only", expect="compiled", layout="td")
class TokensOnly(LoopList):
    """Takes [T, D] only: a probe with three axes raises in the user's code."""

    def forward(self, x: Tensor) -> Tensor:
        count, _ = x.shape
        weights, ids = self.route(x)
        assert weights.shape[0] == count
        return self.mix(x, weights, ids)


@case("dropout_training", expect="compiled")
class DropoutInTraining(LoopList):
    """Dropout inside the experts and on the result: nothing in eval."""

    def build_experts(self) -> None:
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(self.dim, 20), nn.GELU(), nn.Dropout(0.2), nn.Linear(20, self.dim))
            for _ in range(self.num_experts)
        )
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.drop(super().forward(x))
        return out


@case("jitter_training", expect="compiled")
class JitterInTraining(Moe):
    """Input jitter in training, in place; nothing in eval."""

    build_experts = LoopList.build_experts
    expert = LoopList.expert
    mix = LoopList.mix

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x *= torch.empty_like(x).uniform_(0.99, 1.01)
        out: Tensor = super().forward(x)
        return out


@case("two_blocks", expect="compiled", layers=2)
class TwoBlocks(nn.Module):
    """Two different blocks in one model, the second fed by the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = LoopList(experts=4, hidden=12)
        self.norm = nn.LayerNorm(16)
        self.second = Gathered(experts=6, top_k=1, body="gelu")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        out: Tensor = x + self.second(self.norm(x))
        return out


@case("called_twice", expect="compiled")
class CalledTwice(nn.Module):
    """One block called twice in a forward, on different tensors."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.block = LoopList(experts=5, body="gelu")
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.block(x)
        out: Tensor = x + self.block(self.norm(x))
        return out


@case("module_dict", expect="compiled")
class ExpertsInDict(Moe):
    """Experts in a ModuleDict with names that do not sort like numbers (expert_10 before expert_2)."""

    def __init__(self) -> None:
        super().__init__(experts=11, top_k=3)

    def build_experts(self) -> None:
        self.experts = nn.ModuleDict({f"expert_{e}": GeluMlp(self.dim, 10) for e in range(self.num_experts)})

    def mix(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            token, slot = torch.where(ids == e)
            if token.numel():
                out[token] = out[token] + self.experts[f"expert_{e}"](x[token]) * weights[token, slot, None]
        return out
