"""Experts beyond two matrices and an activation with a name: identities, norms, soft caps, sorted segments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.corpus.blocks import softmax_topk_renorm
from tests.corpus.case import Args, as_layout, case

D, HIDDEN, EXPERTS, TOP_K = 16, 24, 6, 2


class Bank(nn.Module):
    """x[T, D], ids[T, K], weights[T, K] -> [T, D]: a loop over the experts that were hit, gate and up in one stack."""

    places, more = EXPERTS, 0  # places in the first stack, ids behind the experts

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(self.places, 2 * HIDDEN, D))
        self.down = nn.Parameter(torch.empty(EXPERTS, D, HIDDEN))

    def act(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    def tail(self, e: int, rows: Tensor) -> Tensor:
        return rows

    def expert(self, e: int, rows: Tensor) -> Tensor:
        gate, up = F.linear(rows, self.gate_up[e]).chunk(2, dim=-1)
        return self.tail(e, F.linear(self.act(gate, up), self.down[e]))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, EXPERTS + self.more)
        for e in mask.sum((0, 1)).nonzero().flatten().tolist():
            token, slot = mask[..., e].nonzero(as_tuple=True)
            out.index_add_(0, token, self.expert(e, x[token]) * weights[token, slot, None])
        return out


class Block(nn.Module):
    """A router over all ids around a bank."""

    dim = D
    bank: type[Bank] = Bank

    def __init__(self) -> None:
        super().__init__()
        self.experts = self.bank()
        self.router = nn.Linear(D, EXPERTS + self.bank.more)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, D)
        weights, ids = softmax_topk_renorm(self.router(rows), TOP_K)
        out: Tensor = self.experts(rows, ids, weights)
        return out.view_as(x)


def with_expert(change: Any) -> Any:
    """A careless reading: the block with `change(bank)` -> (owner, attribute, value) in place."""

    def decoy(module: Any, x: Tensor) -> Tensor:
        name, value = change(module.experts)
        kept = getattr(module.experts, name)
        object.__setattr__(module.experts, name, value)
        try:
            out: Tensor = module(x)
        finally:
            object.__setattr__(module.experts, name, kept)
        return out

    return decoy


def dropped(bank: Any) -> tuple[str, Any]:
    known = bank.expert
    return "expert", lambda e, rows: known(e, rows) if e < EXPERTS else torch.zeros_like(rows)


def untailed(bank: Any) -> tuple[str, Any]:
    return "tail", lambda e, rows: rows


def uncapped(bank: Any) -> tuple[str, Any]:
    return "act", lambda gate, up: F.silu(gate) * up


class IdentityBank(Bank):
    places, more = EXPERTS + 3, 3

    def expert(self, e: int, rows: Tensor) -> Tensor:
        return rows if e >= EXPERTS else super().expert(e, rows)


@case("wider.identity_ids", expect="compiled", decoy=with_expert(dropped))
class IdentityIds(Block):
    """Ids behind the experts return their input; the first stack has places for them, the second has none."""

    bank = IdentityBank


class SkippingBank(IdentityBank):
    more = 4

    def expert(self, e: int, rows: Tensor) -> Tensor:
        return torch.zeros_like(rows) if e == EXPERTS + 3 else super().expert(e, rows)


@case("wider.identity_then_nothing", expect="compiled", decoy=with_expert(dropped))
class IdentityThenNothing(Block):
    """Three ids return their input, the one behind those adds nothing."""

    bank = SkippingBank


class NegatingBank(IdentityBank):
    def expert(self, e: int, rows: Tensor) -> Tensor:
        return -rows if e == EXPERTS + 1 else super().expert(e, rows)


@case("wider.identity_but_one", decoy=with_expert(lambda b: ("expert", lambda e, r: IdentityBank.expert(b, e, r))))
class IdentityButOne(Block):
    """One id among those behind the experts returns its input negated."""

    bank = NegatingBank


class ScaledNormBank(Bank):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(D))

    def tail(self, e: int, rows: Tensor) -> Tensor:
        rows = rows * (1 + self.scale)
        return rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + 1e-6)


@case("wider.norm_after_scale", expect="compiled", decoy=with_expert(untailed))
class NormAfterScale(Block):
    """RMS norm of each expert's result, the weight (plus one) multiplied in before, one vector for all experts."""

    bank = ScaledNormBank


class LayerNormBank(Bank):
    def __init__(self) -> None:
        super().__init__()
        self.norm_weight = nn.Parameter(torch.empty(EXPERTS, D))
        self.norm_bias = nn.Parameter(torch.empty(EXPERTS, D))

    def tail(self, e: int, rows: Tensor) -> Tensor:
        return F.layer_norm(rows, (D,), self.norm_weight[e], self.norm_bias[e], eps=1e-3)


@case("wider.norm_of_each", expect="compiled", decoy=with_expert(untailed))
class NormOfEach(Block):
    """A LayerNorm with weight and bias of its own behind each expert, as [E, D] parameters."""

    bank = LayerNormBank


class SoftmaxBank(Bank):
    def tail(self, e: int, rows: Tensor) -> Tensor:
        return rows.softmax(-1)


@case("wider.softmax_last", expect="left alone", reason=("_softmax",), decoy=with_expert(untailed))
class SoftmaxLast(Block):
    """Each expert ends in a softmax, so that its result is no FFN's."""

    bank = SoftmaxBank


class CentredBank(Bank):
    def tail(self, e: int, rows: Tensor) -> Tensor:
        return rows - rows.mean(0, keepdim=True)


@case("wider.centred_over_rows", expect="left alone", decoy=with_expert(untailed))
class CentredOverRows(Block):
    """Each expert's results are centred over the rows it got: no norm of a row."""

    bank = CentredBank


class SoftcappedBank(Bank):
    def act(self, gate: Tensor, up: Tensor) -> Tensor:
        return 4 * torch.tanh(gate / 4) * torch.sigmoid(gate) * (9 * torch.tanh(up / 9))


@case("wider.softcapped", expect="compiled", decoy=with_expert(uncapped), decoy_scale=8.0)
class Softcapped(Block):
    """A gated activation whose factors are capped softly: an elementwise formula without a name."""

    bank = SoftcappedBank


class CubedBank(Bank):
    def act(self, gate: Tensor, up: Tensor) -> Tensor:
        return (gate - gate.mean(-1, keepdim=True)).tanh() * up


@case("wider.centred_gate", expect="left alone", reason=("no name",), decoy=with_expert(uncapped))
class CentredGate(Block):
    """The gate is centred over its own row: not elementwise, so no formula."""

    bank = CubedBank


class Segments(nn.Module):
    """rows[R, C] sorted by expert, sizes -> [R, N]: one product for each expert's part."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(EXPERTS, outputs, inputs))

    def forward(self, rows: Tensor, sizes: list[int]) -> Tensor:
        parts = rows.split(sizes, dim=0)
        return torch.cat([F.linear(part, self.weight[e]) for e, part in enumerate(parts)])


class Sorting(nn.Module):
    """x[T, D] -> token and weight of each row in the experts' order, rows of each expert, logits."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, EXPERTS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, list[int], Tensor]:
        logits = self.layer(x)
        best, ids = logits.topk(TOP_K, dim=1)
        sizes = torch.bincount(ids.flatten(), minlength=EXPERTS).tolist()
        _, order = ids.flatten().sort(0)
        return order // TOP_K, best.softmax(1).flatten()[order], sizes, logits


@case("wider.segments", expect="compiled")
class SegmentBlock(nn.Module):
    """Two stacks in modules of their own, sorted rows between them, and a router that hands over sorted routing."""

    dim = D

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = Segments(D, 2 * HIDDEN), Segments(HIDDEN, D)
        self.router = Sorting()
        self.bias = nn.Parameter(torch.empty(D))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.reshape(-1, D)
        token, weights, sizes, logits = self.router(rows)
        gate, up = self.into(rows[token], sizes).chunk(2, dim=-1)
        done = self.out(F.silu(gate) * up, sizes) * weights[:, None]
        mixed = torch.zeros_like(rows).index_add(0, token, done)
        return mixed.view_as(x) + self.bias, logits


class ByModality(nn.ModuleList):
    """x[B, S, D], ids[B, 1, 1] -> [B, S, D]: every expert on everything, kept where a sequence is its own."""

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self):
            out = out + expert(x) * (ids == e)
        return out


def sequence_ids(tokens: Tensor) -> Args:
    x = as_layout(tokens, "btd")
    return x, torch.arange(x.shape[0]).flip(0) % 4


@case("wider.one_choice_a_sequence", args=sequence_ids, needs_inputs=True, reason=("needs x, ids",))
class OneChoiceASequence(nn.Module):
    """The caller says which expert a sequence has; a matrix each, and a part of the features is shared."""

    dim = D

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(D, D)
        self.experts = ByModality(nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        out: Tensor = self.experts(x, ids.view(-1, 1, 1))
        return torch.cat([self.shared(x), out], dim=-1)
