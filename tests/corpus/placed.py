"""Experts that take rows by their places: capacity einsums, dense mixtures with several gates, slots for sequences.

T tokens, B sequences, S tokens a sequence, D model width, E experts, C places of an expert, F expert width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.corpus.blocks import GeluMlp, Swiglu
from tests.corpus.case import case


class Placed(nn.Module):
    """rows[E, C, D] -> [E, C, D], in products over all experts."""

    def __init__(self, num_experts: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden, dim))

    def forward(self, rows: Tensor) -> Tensor:
        return torch.einsum("ecf,efd->ecd", F.relu(torch.einsum("ecd,edf->ecf", rows, self.w1)), self.w2)


class _Dispatch(nn.Module):
    """Top 1 with a capacity for each sequence: dispatch and combination are one-hot [B, S, E, C]."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.logits = nn.Linear(dim, num_experts, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight, chosen = self.noisy(self.logits(x).softmax(-1)).max(-1)
        places = max(2, int(1.25 * x.shape[1] / self.num_experts))
        hits = F.one_hot(chosen, self.num_experts)
        arrival = (hits.cumsum(1) - 1).gather(-1, chosen[..., None])[..., 0]
        place = F.one_hot(arrival.clamp(max=places), places + 1)[..., :places]
        dispatch = (hits[..., None] * place[..., None, :]).to(x.dtype)
        return dispatch, dispatch * weight[..., None, None]

    def noisy(self, scores: Tensor) -> Tensor:
        return scores


@case("placed.capacity_submodule", expect="compiled")
class CapacitySubmodule(nn.Module):
    """The experts are a module over [E, places, D]; who gets a place, and who none, is the router's and stays so."""

    dim = 16
    experts: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.router = self.make_router()
        self.experts = Placed(4, 16, 20)

    def make_router(self) -> _Dispatch:
        return _Dispatch(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        dispatch, combine = self.router(x)
        rows = torch.einsum("bsd,bsec->ebcd", x, dispatch)
        done = self.experts(rows.reshape(4, -1, 16)).reshape(rows.shape)
        return torch.einsum("ebcd,bsec->bsd", done, combine)


class _Drawing(_Dispatch):
    def noisy(self, scores: Tensor) -> Tensor:
        return scores * torch.rand_like(scores)


@case("placed.router_draws", expect="compiled", random=True)
class RouterDraws(CapacitySubmodule):
    """The router draws random numbers in eval; the experts' own call does not, and is all that is replaced."""

    def make_router(self) -> _Dispatch:
        return _Drawing(16, 4)


class _Chunks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList(GeluMlp(16, 20) for _ in range(4))

    def forward(self, rows: Tensor) -> Tensor:
        parts = [expert(part) for part, expert in zip(rows.chunk(4, dim=1), self.members, strict=True)]
        return torch.cat(parts, dim=1)


@case("placed.chunks", expect="compiled")
class Chunks(CapacitySubmodule):
    """A list of experts, each of them given its chunk along the second axis, joined again by cat."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = _Chunks()

    def forward(self, x: Tensor) -> Tensor:
        dispatch, combine = self.router(x)
        rows = torch.einsum("bsd,bsec->becd", x, dispatch)
        return torch.einsum("becd,bsec->bsd", self.experts(rows), combine)


class _Uneven(_Chunks):
    def forward(self, rows: Tensor) -> Tensor:
        done = super().forward(rows)
        return torch.cat([done[:, :3], done[:, 3:] * rows[:, 3:].mean()], 1)


@case("placed.chunks_one_differs", expect="left alone")
class ChunksOneDiffers(Chunks):
    """The last expert's result is scaled by the mean of its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = _Uneven()


@case("placed.two_tasks", expect="compiled", layout="td")
class TwoTasks(nn.Module):
    """Every expert takes every row once; two gates mix the results for two tasks."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(GeluMlp(16, 20) for _ in range(3))
        self.gates = nn.ModuleList(nn.Linear(16, 3) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        done = torch.stack([expert(x) for expert in self.experts], dim=1)
        return tuple(torch.einsum("te,ted->td", gate(x).softmax(-1), done) for gate in self.gates)


@case("placed.two_tasks_last_axis", expect="compiled", layout="td")
class TwoTasksLastAxis(TwoTasks):
    """The results stacked along the last axis, behind the features."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        done = torch.stack([expert(x) for expert in self.experts], dim=-1)
        return tuple((gate(x).softmax(-1).unsqueeze(1) * done).sum(-1) for gate in self.gates)


@case("placed.two_tasks_masked_input", expect="either", layout="td", decoy=lambda m, x: TwoTasks.forward(m, x)[0])
class TwoTasksMaskedInput(TwoTasks):
    """Each expert takes its own part of the features: they do not read the same rows."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        keep = torch.eye(3, dtype=x.dtype, device=x.device).repeat_interleave(6, 1)[:, :16]
        done = torch.stack([expert(x * keep[e]) for e, expert in enumerate(self.experts)], dim=1)
        return tuple(torch.einsum("te,ted->td", gate(x).softmax(-1), done) for gate in self.gates)


@case("placed.slots", expect="compiled")
class Slots(nn.Module):
    """Soft MoE: each expert has two slots a sequence, mixes of all its tokens; tokens are mixes of slots."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.empty(4, 2, 16))
        self.members = nn.ModuleList(Swiglu(16, 12) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.einsum("bsd,epd->bsep", x, self.slots)
        rows = torch.einsum("bsep,bsd->ebpd", logits.softmax(1), x)
        done = torch.stack([expert(part) for expert, part in zip(self.members, rows, strict=True)])
        mixed = logits.flatten(2).softmax(-1).view_as(logits)
        return torch.einsum("bsep,ebpd->bsd", mixed, done)


class _Remembering(nn.Module):
    """Sets its capacity anew on each call, from the number of tokens alone."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Linear(16, 4)
        self.capacity = 64

    def forward(self, x: Tensor) -> Tensor:
        self.capacity = max(1, x.shape[0] // 3)
        scores = self.logits(x).softmax(-1)
        hit = F.one_hot(scores.argmax(-1), 4)
        kept: Tensor = scores * hit * (hit.cumsum(0) <= self.capacity)
        return kept


@case("placed.router_remembers", expect="compiled")
class RouterRemembers(nn.Module):
    """The router sets an attribute of its own, which its call goes on to do; results are multiplied by a number."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.router = _Remembering()
        self.experts = nn.ModuleList(GeluMlp(16, 20) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 16)
        weights = self.router(rows)
        asked = weights.bool()
        each = torch.einsum("td,te->etd", rows, asked.to(rows.dtype))
        for e, expert in enumerate(self.experts):
            done = expert(each[e, asked[:, e]])
            done *= 0.8
            each[e, asked[:, e]] = weights[asked[:, e], e, None] * done
        return each.sum(0).view_as(x)


class _Counting(_Remembering):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.capacity = self.calls = getattr(self, "calls", 0) + 1
        return out


@case("placed.router_counts", expect="left alone", reason=("sets attribute",))
class RouterCounts(RouterRemembers):
    """The router counts its calls: another number of calls would leave another number."""

    def __init__(self) -> None:
        super().__init__()
        self.router = _Counting()


@case("placed.lost_tokens_stay", expect="compiled")
class LostTokensStay(nn.Module):
    """Tokens beyond an expert's capacity go through as they are; the others are overwritten by their expert."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 4)
        self.experts = nn.ModuleList(GeluMlp(16, 20) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        hit = F.one_hot(scores.argmax(-1), 4)
        hit = (hit * (hit.cumsum(1) <= 3)).bool()
        out = x.clone()
        for e, expert in enumerate(self.experts):
            out[hit[..., e]] = expert(x[hit[..., e]])
        mixed: Tensor = out * scores.amax(-1, keepdim=True)
        return mixed


class _Masked(nn.Module):
    """A block that takes a mask beside its tokens: masked ones are routed nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 4)
        self.experts = nn.ModuleList(GeluMlp(16, 20) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2)
        weights = weights * mask[..., None]
        rows, out = x.reshape(-1, 16), torch.zeros_like(x).reshape(-1, 16)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen.view(-1, 2) == e)
            out.index_add_(0, token, expert(rows[token]) * weights.view(-1, 2)[token, slot, None])
        return out.view_as(x)


def _mask(x: Tensor) -> tuple[Tensor, Tensor]:
    count = x.shape[0]
    batch = next((b for b in (2, 3, 5) if count % b == 0), 1)
    tokens = x.reshape(batch, count // batch, 16)
    return tokens, (tokens[..., 0] > -0.5).to(x.dtype)


@case("placed.mask_beside_tokens", args=_mask, reason=("pass example_inputs",))
class MaskBesideTokens(_Masked):
    """Two tensors go into the block; the second one has the sizes of the first."""

    dim = 16


@case("placed.mask_looked_at", expect="left alone", args=_mask, reason=("may branch", "pass example_inputs"))
class MaskLookedAt(_Masked):
    """Python looks at the mask and does something else where all tokens count."""

    dim = 16

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x, mask) * (0.5 if bool((mask > 0).all()) else 1.0)
