"""MoE blocks in the styles people write by hand; the corpus varies their routers, bodies, sizes and epilogues.

T tokens, D model width, K experts a token, E experts, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Swiglu(nn.Module):
    """[N, D] -> [N, D]: down(silu(gate x) * up x)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class GeluMlp(nn.Module):
    """[N, D] -> [N, D]: Linear, GELU, Linear with biases."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


def relu_mlp(dim: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))


def bare_relu(dim: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, dim, bias=False))


MODULE_BODIES: dict[str, Callable[[int, int], nn.Module]] = {
    "swiglu": Swiglu,
    "gelu": GeluMlp,
    "relu": relu_mlp,
    "bare_relu": bare_relu,
}


def softmax_topk_renorm(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """[T, E] -> weights [T, K], experts [T, K]: the router everybody expects."""
    weights, ids = logits.softmax(-1).topk(k, dim=-1)
    return weights / weights.sum(-1, keepdim=True), ids


class Moe(nn.Module):
    """x[..., D] -> x[..., D]: `route` picks K of E experts for each token, `mix` runs them."""

    dim = 16

    def __init__(
        self, *, dim: int | None = None, hidden: int = 24, experts: int = 8, top_k: int = 2, body: str = "swiglu"
    ) -> None:
        super().__init__()
        self.dim = dim or type(self).dim
        self.hidden, self.num_experts, self.top_k, self.body = hidden, experts, top_k, body
        self.build_router()
        self.build_experts()

    def build_router(self) -> None:
        self.router = nn.Linear(self.dim, self.num_experts, bias=False)

    def build_experts(self) -> None:
        raise NotImplementedError

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x[T, D] -> weights[T, K], experts[T, K]."""
        return softmax_topk_renorm(self.router(x), self.top_k)

    def mix(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Any:
        rows = x.reshape(-1, x.shape[-1])
        weights, ids = self.route(rows)
        return self.mix(rows, weights, ids).reshape(x.shape)


class LoopList(Moe):
    """A ModuleList of experts, a loop that asks `where` each one was picked."""

    def build_experts(self) -> None:
        make = MODULE_BODIES[self.body]
        self.experts = nn.ModuleList(make(self.dim, self.hidden) for _ in range(self.num_experts))

    def expert(self, e: int, rows: Tensor) -> Tensor:
        out: Tensor = self.experts[e](rows)
        return out

    def mix(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(len(self.experts)):
            token, slot = torch.where(ids == e)
            if token.numel() == 0:
                continue
            out.index_add_(0, token, self.expert(e, x[token]) * weights[token, slot, None])
        return out


class Stacked(Moe):
    """Experts as 3-D parameters."""

    def build_experts(self) -> None:
        e, d, f = self.num_experts, self.dim, self.hidden
        self.w1 = nn.Parameter(torch.empty(e, f, d))
        self.w2 = nn.Parameter(torch.empty(e, d, f))
        if self.body == "swiglu":
            self.w3 = nn.Parameter(torch.empty(e, f, d))
        if self.body == "gelu":
            self.b1 = nn.Parameter(torch.empty(e, f))
            self.b2 = nn.Parameter(torch.empty(e, d))


class LoopStacked(Stacked):
    """A loop over the experts' slices, `index_add_` into the result."""

    def expert(self, e: int, rows: Tensor) -> Tensor:
        if self.body == "swiglu":
            return F.linear(F.silu(F.linear(rows, self.w1[e])) * F.linear(rows, self.w3[e]), self.w2[e])
        if self.body == "gelu":
            return F.linear(F.gelu(F.linear(rows, self.w1[e], self.b1[e])), self.w2[e], self.b2[e])
        return torch.relu(rows @ self.w1[e].T) @ self.w2[e].T

    def mix(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            token, slot = (ids == e).nonzero(as_tuple=True)
            if len(token):
                out[token] += self.expert(e, x[token]) * weights[token, slot].unsqueeze(-1)
        return out


class Sorted(Moe):
    """Slots sorted by expert, split with `.tolist()`, run segment by segment, put back in order."""

    def build_experts(self) -> None:
        make = MODULE_BODIES[self.body]
        self.experts = nn.ModuleList(make(self.dim, self.hidden) for _ in range(self.num_experts))

    def mix(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        order = ids.flatten().argsort()
        counts = torch.bincount(ids.flatten(), minlength=self.num_experts).tolist()
        segments = torch.split(x[order // self.top_k], counts)
        done = [expert(rows) for expert, rows in zip(self.experts, segments, strict=True) if len(rows)]
        rows = torch.cat(done)
        slots = torch.empty_like(rows)
        slots[order] = rows
        return (slots.view(-1, self.top_k, self.dim) * weights[..., None]).sum(1)


class Gathered(Stacked):
    """The weights of the picked experts gathered for each token, then einsum."""

    def mix(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        h = torch.einsum("td,tkfd->tkf", x, self.w1[ids])
        if self.body == "swiglu":
            h = F.silu(h) * torch.einsum("td,tkfd->tkf", x, self.w3[ids])
        elif self.body == "gelu":
            h = F.gelu(h + self.b1[ids])
        else:
            h = torch.relu(h)
        y = torch.einsum("tkf,tkdf->tkd", h, self.w2[ids])
        if self.body == "gelu":
            y = y + self.b2[ids]
        return torch.einsum("tkd,tk->td", y, weights)


class DenseAll(Stacked):
    """Every expert on every token by bmm; a [T, E] gate that is zero where an expert was not picked."""

    def mix(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        gate = x.new_zeros(x.shape[0], self.num_experts).scatter(1, ids, weights)
        copies = x.unsqueeze(0).expand(self.num_experts, -1, -1)
        h = torch.bmm(copies, self.w1.transpose(1, 2))
        if self.body == "swiglu":
            h = F.silu(h) * torch.bmm(copies, self.w3.transpose(1, 2))
        elif self.body == "gelu":
            h = F.gelu(h + self.b1[:, None])
        else:
            h = F.relu(h)
        y = torch.bmm(h, self.w2.transpose(1, 2))
        if self.body == "gelu":
            y = y + self.b2[:, None]
        return torch.einsum("etd,te->td", y, gate)


STYLES: dict[str, type[Moe]] = {
    "loop_list": LoopList,
    "loop_stacked": LoopStacked,
    "sorted": Sorted,
    "gathered": Gathered,
    "dense_all": DenseAll,
}


def naive(module: Any, x: Tensor) -> Tensor:
    """What a reader computes who takes any block for softmax, top-k, renormalise, mix."""
    rows = x.reshape(-1, x.shape[-1])
    weights, ids = softmax_topk_renorm(module.router(rows), module.top_k)
    out: Tensor = module.mix(rows, weights, ids)
    return out.reshape(x.shape)
