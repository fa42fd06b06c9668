"""Styles of older code: experts' layers in modules of their own over rows sorted by expert, arguments nobody reads.

T tokens, D model width, K experts a token, E experts, F expert width, R = T * K rows sorted by expert.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.corpus.case import case


class Stack(nn.Module):
    """One layer of all experts: rows[R, C] sorted by expert and how many each has -> [R, N]."""

    def __init__(self, num_experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, outputs, inputs))

    def forward(self, rows: Tensor, counts: list[int]) -> Tensor:
        parts = rows.split(counts, dim=0)
        return torch.cat([F.linear(part, self.weight[e]) for e, part in enumerate(parts)], dim=0)


class Sorter(nn.Module):
    """Hands out the sorted rows' tokens and weights, and counts as Python numbers, but never the choice itself."""

    def __init__(self, dim: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.logits = nn.Linear(dim, num_experts, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, list[int], Tensor]:
        logits = self.logits(x)
        best, chosen = logits.topk(self.top_k, dim=-1)
        counts = torch.zeros_like(logits).scatter(1, chosen, 1).long().sum(0).tolist()
        order = chosen.flatten().sort(0).indices
        token = order.div(self.top_k, rounding_mode="trunc")
        return token, best.softmax(-1).flatten()[order], counts, logits


class _SplitSizes(nn.Module):
    dim = 20

    def __init__(self) -> None:
        super().__init__()
        self.router = Sorter(20, 6, 2)
        self.input_layer = Stack(6, 20, 2 * 12)
        self.output_layer = Stack(6, 12, 20)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.reshape(-1, 20)
        token, weights, counts, logits = self.router(rows)
        gate, up = self.input_layer(rows[token], counts).chunk(2, dim=-1)
        done = self.output_layer(self.mixed(F.silu(gate) * up), counts) * weights[:, None]
        return torch.zeros_like(rows).index_add(0, token, done).view_as(x), logits

    def mixed(self, hidden: Tensor) -> Tensor:
        return hidden


@case("older.split_sizes", expect="compiled")
class SplitSizes(_SplitSizes):
    """Rows split by counts read as Python numbers, one product an expert, joined by cat before the activation."""


@case("older.split_sizes_biased", expect="compiled")
class SplitSizesBiased(_SplitSizes):
    """The same with a bias behind the mixture, and a router whose module has parameters in between."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(20))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, logits = super().forward(x)
        return out + self.bias, logits


@case("older.split_sizes_rolled", expect="left alone", reason=("no tensors",))
class SplitSizesRolled(_SplitSizes):
    """Sorted rows of all experts are in one tensor between the layers: here each gets its neighbour's hidden values."""

    def mixed(self, hidden: Tensor) -> Tensor:
        return hidden.roll(1, 0)


class _Counted(nn.Module):
    """One layer of all experts over slices that are written into one result."""

    def __init__(self, num_experts: int, inputs: int, outputs: int, swapped: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, inputs, outputs))
        self.swapped = swapped

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        ends = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        out = rows.new_zeros(rows.shape[0], self.weight.shape[-1])
        for e in range(self.weight.shape[0]):
            start, end = ends[e], ends[e + 1]
            out[start:end] = rows[start:end] @ self.weight[e ^ 1 if self.swapped else e]
        return out


class _SlicesWritten(nn.Module):
    dim = 16
    swapped = False

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 6)
        self.fc1 = _Counted(6, 16, 20)
        self.fc2 = _Counted(6, 10, 16, self.swapped)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 16)
        best, chosen = self.router(rows).topk(2, dim=1)
        weights = best.softmax(-1)
        counts = torch.histc(chosen.flatten().float(), bins=6, min=0, max=5).to(chosen.dtype)
        order = chosen.view(-1).argsort()
        up, gate = self.fc1(rows.index_select(0, order // 2), counts).chunk(2, dim=-1)
        done = self.fc2(F.silu(up) * gate, counts)
        back = torch.zeros_like(done).index_copy_(0, order, done).view(-1, 2, 16)
        out: Tensor = (back * weights.unsqueeze(-1)).sum(1).view_as(x)
        return out


@case("older.slices_written", expect="compiled")
class SlicesWritten(_SlicesWritten):
    """A histogram of the choice, slices by tensors, each expert's product written into its slice of one tensor."""


def _unswapped(module: SlicesSwapped, x: Tensor) -> Tensor:
    module.fc2.swapped = False
    out: Tensor = module(x)
    module.fc2.swapped = True
    return out


@case("older.slices_swapped", decoy=_unswapped)
class SlicesSwapped(_SlicesWritten):
    """The second layer takes the neighbour's matrix: expert e is made of matrices e and e xor 1."""

    swapped = True


class _Choosing(nn.Module):
    """Experts that are handed more than they read."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(5, 12, 18))
        self.down = nn.Parameter(torch.empty(5, 18, 12))

    def forward(self, x: Tensor, scores: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(5):
            token, slot = torch.where(chosen == e)
            out.index_add_(0, token, F.gelu(x[token] @ self.up[e]) @ self.down[e] * weights[token, slot, None])
        return out


@case("older.unread_argument", expect="compiled")
class UnreadArgument(nn.Module):
    """The experts' call gets all scores beside the chosen ones and never looks at them."""

    dim = 12
    experts: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(12, 5)
        self.experts = _Choosing()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 12)
        scores = self.router(rows).softmax(-1)
        weights, chosen = scores.topk(2)
        out: Tensor = self.experts(rows, scores, chosen, weights).view_as(x)
        return out


class _Peeking(_Choosing):
    def forward(self, x: Tensor, scores: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = super().forward(x, scores, chosen, weights)
        return out * (2.0 if scores.shape[0] > 100 and bool(scores[100:].max() > 0.5) else 1.0)


@case("older.argument_read_later", decoy=lambda m, x: _Choosing.forward(m.experts, *_given(m, x)), decoy_tokens=130)
class ArgumentReadLater(UnreadArgument):
    """The scores are looked at after the hundredth token only: no short run shows that they are read."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = _Peeking()


def _given(module: ArgumentReadLater, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.reshape(-1, 12)
    scores = module.router(rows).softmax(-1)
    weights, chosen = scores.topk(2)
    return rows, scores, chosen, weights
