"""Expert choice: each expert takes the tokens it scores highest; and what only looks like that.

T tokens, D model width, E experts, C tokens of an expert, F expert width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.corpus.blocks import MODULE_BODIES
from tests.corpus.case import case


class Choosing(nn.Module):
    """A block whose methods choose and mix; each expert takes a third of the tokens, or one."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.empty(16, 4))
        self.experts = nn.ModuleList(MODULE_BODIES["gelu"](16, 20) for _ in range(4))

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = (x @ self.router).softmax(-1).T.topk(max(1, int(0.34 * x.shape[0])))
        return ids, weights

    def mix(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out[ids[e]] += weights[e, :, None] * expert(x[ids[e]])
        return out

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 16)
        return self.mix(rows, *self.choose(rows)).view_as(x)


def careless(m: Any, x: Tensor) -> Tensor:
    """What an expert has twice counts twice, and every expert's result is added."""
    rows = x.reshape(-1, 16)
    ids, weights = m.choose(rows)
    out = torch.zeros_like(rows)
    for e, expert in enumerate(m.experts):
        out.index_add_(0, ids[e], weights[e, :, None] * expert(rows[ids[e]]))
    return out.view_as(x)


@case("choice.methods", expect="compiled")
class ChoiceMethods(Choosing):
    """Experts choose tokens, a loop over a list adds their results: the call with x, ids and weights is replaced."""


class _Router(nn.Module):
    """The choice as a module of its own, which keeps working out the capacity."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(16, 4, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.noisy(self.scores(x).softmax(-1).T).topk(max(1, int(0.4 * x.shape[0])))
        return ids, weights

    def noisy(self, scores: Tensor) -> Tensor:
        return scores


@case("choice.router_module", expect="compiled")
class ChoiceRouterModule(nn.Module):
    """A router module chooses; the loop is a part of the block's own code, with a residual behind it."""

    dim = 16
    body = "swiglu"

    def __init__(self) -> None:
        super().__init__()
        self.router = self.make_router()
        self.experts = nn.ModuleList(MODULE_BODIES[self.body](16, 20) for _ in range(4))

    def make_router(self) -> nn.Module:
        return _Router()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 16)
        ids, weights = self.router(rows)
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            out.index_add_(0, ids[e], expert(rows[ids[e]]) * weights[e].unsqueeze(-1))
        return x + out.view_as(x)


class _ByPlace(_Router):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.scores(x).sigmoid().topk(max(1, int(0.4 * x.shape[0])), dim=0)
        return ids, weights


@case("choice.experts_last", expect="compiled")
class ChoiceExpertsLast(ChoiceRouterModule):
    """The top tokens are taken along the first axis, so ids are [C, E]; weights are sigmoids."""

    def make_router(self) -> nn.Module:
        return _ByPlace()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 16)
        ids, weights = self.router(rows)
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            out[ids[:, e]] += expert(rows[ids[:, e]]) * weights[:, e, None]
        return out.view_as(x)


class _Signed(_Router):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.scores(x).T.topk(max(1, int(0.4 * x.shape[0])))
        return ids, weights


@case("choice.signed_weights", expect="compiled")
class ChoiceSignedWeights(ChoiceRouterModule):
    """Experts of relu without biases, whose weights are raw scores of either sign: input and result differ."""

    body = "bare_relu"

    def make_router(self) -> nn.Module:
        return _Signed()


@case("choice.on_input", expect="compiled")
class ChoiceOnInput(ChoiceSignedWeights):
    """The same with the weights on what goes into the experts."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 16)
        ids, weights = self.router(rows)
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            out.index_add_(0, ids[e], expert(rows[ids[e]] * weights[e].unsqueeze(-1)))
        return out.view_as(x)


@case("choice.gathered", expect="compiled")
class ChoiceGathered(nn.Module):
    """Chosen rows gathered to [E, C, D], products over all experts, results added where they came from."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.router = _Router()
        self.w1, self.w2 = nn.Parameter(torch.empty(4, 16, 20)), nn.Parameter(torch.empty(4, 20, 16))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 16)
        ids, weights = self.router(rows)
        hidden = F.gelu(torch.einsum("ecd,edf->ecf", rows[ids], self.w1))
        done = torch.einsum("ecf,efd->ecd", hidden, self.w2) * weights[..., None]
        return torch.zeros_like(rows).index_add(0, ids.flatten(), done.flatten(0, 1)).view_as(x)


@case("choice.one_hot", expect="compiled")
class ChoiceOneHot(ChoiceGathered):
    """The same by a one-hot [E, C, T] in einsums."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 16)
        ids, weights = self.router(rows)
        place = F.one_hot(ids, rows.shape[0]).to(rows.dtype)
        hidden = F.gelu(torch.einsum("ecd,edf->ecf", torch.einsum("ect,td->ecd", place, rows), self.w1))
        done = torch.einsum("ecf,efd->ecd", hidden, self.w2)
        return torch.einsum("ecd,ect,ec->td", done, place, weights).view_as(x)


class _Drawing(_Router):
    def noisy(self, scores: Tensor) -> Tensor:
        return scores + 0.3 * torch.rand_like(scores)


@case("choice.noise_in_eval", expect="left alone", random=True, reason=("draws random numbers",))
class ChoiceNoise(ChoiceRouterModule):
    """The router adds noise in eval: the block is no function of its input."""

    def make_router(self) -> nn.Module:
        return _Drawing()


@case("choice.noise_in_another_call", expect="compiled", random=True)
class ChoiceNoiseAside(Choosing):
    """Noise in eval, too, but the call that mixes has none of it."""

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = (x @ self.router).softmax(-1)
        weights, ids = (scores + 0.3 * torch.rand_like(scores)).T.topk(max(1, int(0.34 * x.shape[0])))
        return ids, weights


@case("choice.overwrites", expect="left alone", decoy=careless)
class ChoiceOverwrites(Choosing):
    """The last expert that chose a token overwrites what the others gave it."""

    def mix(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out[ids[e]] = weights[e, :, None] * expert(x[ids[e]])
        return out


@case("choice.repeats", expect="left alone", decoy=careless)
class ChoiceRepeats(Choosing):
    """Ids may come twice in one expert's part, where += keeps one of them."""

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ids, weights = super().choose(x)
        return ids // 2, weights


@case("choice.may_repeat", expect="left alone", reason=("twice",))
class ChoiceMayRepeat(Choosing):
    """Ids that come once on every probe, but that no selection made."""

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ids = (torch.arange(0, x.shape[0], 2) + torch.arange(4)[:, None]) % x.shape[0]
        return ids, (x[ids] * self.router.T[:, None]).sum(-1).sigmoid()


@case("choice.mean_of_choosers", expect="either", decoy=careless)
class ChoiceMean(Choosing):
    """A token's results are divided by how many experts chose it."""

    def mix(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        count = torch.zeros(x.shape[0]).index_add(0, ids.flatten(), torch.ones(ids.numel()))
        return super().mix(x, ids, weights) / count.clamp(min=1)[:, None]


@case("choice.in_sequences", expect="either")
class ChoiceInSequences(ChoiceRouterModule):
    """Each sequence is chosen from by itself: ids are positions in their sequence."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for b, rows in enumerate(x):
            ids, weights = self.router(rows)
            for e, expert in enumerate(self.experts):
                out[b, ids[e]] += expert(rows[ids[e]]) * weights[e].unsqueeze(-1)
        return out


@case("choice.capacity_inside", expect="either", reason=("no size of the input",))
class ChoiceCapacityInside(ChoiceRouterModule):
    """The block itself works out how many tokens an expert takes."""

    def make_router(self) -> nn.Module:
        return nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 16)
        weights, ids = self.router(rows).softmax(-1).T.topk(max(1, int(rows.shape[0] * 1.5 / 4)))
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            out.index_add_(0, ids[e], expert(rows[ids[e]]) * weights[e].unsqueeze(-1))
        return out.view_as(x)
