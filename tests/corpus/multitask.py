"""Dense mixtures of several tasks: experts computed once, and gates of each task over all of them or some.

T rows, D features of a row, E experts, F expert width, O outputs of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.corpus.case import case


class Tower(nn.Module):
    """rows[T, D] -> [T, O]: layers in a list, each with an activation, the last one too."""

    def __init__(self, *widths: int, normed: bool = False, inplace: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm1d(b) for b in widths[1:]) if normed else None
        self.act = nn.ReLU(inplace=inplace)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x)
            x = x if self.norms is None else self.norms[i](x)
            x = self.drop(self.act(x))
        return x

    def fill_(self, generator: torch.Generator) -> None:
        """Statistics as if it had been trained."""
        for norm in self.norms or ():
            assert isinstance(norm, nn.BatchNorm1d)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator) * 0.4)
            norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) + 0.3)


@case("multitask.gates", expect="compiled", layout="td")
class Gates(nn.Module):
    """Three experts that are lists of layers themselves, two tasks with a gate and a tower each."""

    dim = 16
    widths: tuple[int, ...] = (16, 24, 8)
    normed = False
    inplace = False

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Tower(*self.widths, normed=self.normed, inplace=self.inplace) for _ in range(3))
        self.gates = nn.ModuleList(nn.Linear(16, 3, bias=False) for _ in range(2))
        self.towers = nn.ModuleList(nn.Linear(8, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.mix([self.weigh(gate(x)) for gate in self.gates], x)

    def mix(self, weights: list[Tensor], x: Tensor) -> Tensor:
        done = torch.stack([self.finish(expert(x)) for expert in self.experts], 1)
        mixed = [(one.unsqueeze(1) @ done).squeeze(1) for one in weights]
        return torch.cat([tower(one) for tower, one in zip(self.towers, mixed, strict=True)], 1)

    def weigh(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1)

    def finish(self, y: Tensor) -> Tensor:
        return y


def _batch_statistics(module: Gates, x: Tensor) -> Tensor:
    module.train()
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.eval()
    out = Gates.forward(module, x)
    module.eval()
    return out


def _other_statistics(module: Gates) -> None:
    norm: Any = module.get_submodule("experts.1.norms.0")
    norm.running_var.mul_(3)
    norm.running_mean.add_(0.5)


@case("multitask.batch_norm", expect="compiled", layout="td", decoy=_batch_statistics, perturb=_other_statistics)
class BatchNormInside(Gates):
    """Batch norm between the experts' layers and behind them: in eval an affine map of each feature."""

    normed = True


@case("multitask.three_layers", expect="compiled", layout="td")
class ThreeLayers(Gates):
    """Experts of three layers with batch norm between all of them."""

    widths = (16, 24, 12, 8)
    normed = True


@case("multitask.one_layer", expect="compiled", layout="td")
class OneLayer(Gates):
    """Experts of one layer, written to in place by their activation."""

    widths = (16, 8)
    inplace = True


@case(
    "multitask.gate_over_batch",
    expect="either",
    layout="td",
    decoy=lambda m, x: m.mix([g(x).softmax(-1) for g in m.gates], x),
)
class GateOverBatch(Gates):
    """The gates' scores are normalised over the rows of the batch instead of over the experts."""

    def weigh(self, scores: Tensor) -> Tensor:
        return scores.softmax(0)


@case("multitask.experts_end_in_softmax", expect="either", layout="td")
class ExpertsEndInSoftmax(Gates):
    """Each expert's result goes through a softmax of its own before it is mixed."""

    def finish(self, y: Tensor) -> Tensor:
        return y.softmax(-1)


@case("multitask.dropout_in_eval", expect="left alone", layout="td", random=True, reason=("draws random",))
class DropoutInEval(Gates):
    """Results are dropped at random in eval, too."""

    def finish(self, y: Tensor) -> Tensor:
        return F.dropout(y, 0.4, training=True)


@case("multitask.norm_by_batch", expect="left alone", layout="td", long=False)
class NormByBatch(Gates):
    """Batch norm that keeps no statistics takes those of the batch, in eval too: rows depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(_ByBatch() for _ in range(3))


class _ByBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        if len(hidden) > 1:
            hidden = F.batch_norm(hidden, None, None, training=True)
        y: Tensor = self.down(hidden.relu())
        return y


@case("multitask.ensemble", expect="either", layout="td", unseen=True)
class Ensemble(Gates):
    """No gates at all: the mean of the experts."""

    def forward(self, x: Tensor) -> Tensor:
        done = torch.stack([expert(x) for expert in self.experts], 1).mean(1)
        return torch.cat([tower(done) for tower in self.towers], 1)


@case("multitask.side_by_side", expect="left alone", layout="td", unseen=True)
class SideBySide(Gates):
    """Not a mixture: modules alike whose results stand side by side, as heads of an attention do."""

    def __init__(self) -> None:
        super().__init__()
        self.join = nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.join(torch.cat([expert(x) for expert in self.experts], -1))
        return out


class _Level(nn.Module):
    """One level of experts of each task and shared ones, in lists within lists, with gates over some of them each."""

    def __init__(self, dim: int, last: bool) -> None:
        super().__init__()
        self.own = nn.ModuleList(nn.ModuleList(Tower(dim, 20, 12) for _ in range(2)) for _ in range(2))
        self.shared = nn.ModuleList([Tower(dim, 20, 12)])
        self.own_gates = nn.ModuleList(nn.Linear(dim, 3) for _ in range(2))
        self.shared_gate = None if last else nn.Linear(dim, 5)

    def forward(self, rows: Sequence[Tensor]) -> list[Tensor]:
        own = [[expert(rows[i]) for expert in group] for i, group in enumerate(self.own)]  # type: ignore[attr-defined]
        shared = [expert(rows[-1]) for expert in self.shared]
        outs = [self.mix(gate(x), [*mine, *shared]) for gate, mine, x in zip(self.own_gates, own, rows, strict=False)]
        if self.shared_gate is not None:
            outs.append(self.mix(self.shared_gate(rows[-1]), [*own[0], *own[1], *shared]))
        return outs

    def mix(self, scores: Tensor, parts: list[Tensor]) -> Tensor:
        return (scores.softmax(-1).unsqueeze(-1) * torch.stack(parts, 1)).sum(1)


@case("multitask.levels", expect="compiled", layout="td")
class Levels(nn.Module):
    """Two levels: the second one's experts take what the first one's gates made, each task's its own."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList([_Level(16, last=False), _Level(12, last=True)])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        rows = [x, x, x]
        for level in self.levels:
            rows = level(rows)
        return tuple(rows)


@case("multitask.shared_expert_object", expect="compiled", layout="td")
class SharedExpertObject(Gates):
    """One expert is in the lists of both tasks, and runs once for each of them."""

    def __init__(self) -> None:
        super().__init__()
        first = self.experts[0]
        self.lists = nn.ModuleList(nn.ModuleList([first, Tower(*self.widths)]) for _ in range(2))
        self.two = nn.ModuleList(nn.Linear(16, 2) for _ in range(2))
        del self.experts, self.gates

    def forward(self, x: Tensor) -> Tensor:
        outs = []
        for gate, group, tower in zip(self.two, self.lists, self.towers, strict=True):
            weights = gate(x).sigmoid()
            assert isinstance(group, nn.ModuleList)
            outs.append(tower(weights[:, :1] * group[0](x) + weights[:, 1:] * group[1](x)))
        return torch.cat(outs, 1)


@case("multitask.two_level_stacks", expect="compiled")
class TwoLevelStacks(nn.Module):
    """Experts of two levels in stacks [E1, E2, ., .]: a gate for the groups, and one of each group for its experts."""

    dim = 16
    order: tuple[int, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.Linear(16, 3)
        self.inner = nn.Parameter(torch.empty(3, 16, 4))
        self.w1 = nn.Parameter(torch.empty(3, 4, 16, 20))
        self.w2 = nn.Parameter(torch.empty(3, 4, 20, 16))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.outer(x).softmax(-1)[..., None] * torch.einsum("bsd,gde->bsge", x, self.inner).softmax(-1)
        hit = F.one_hot(weights.flatten(2).argmax(-1), 12).view_as(weights).to(x.dtype)
        rows = torch.einsum("bsge,bsd->gebsd", hit, x)
        done = self.run(rows.flatten(2, 3))
        return torch.einsum("gebsd,bsge->bsd", done.view_as(rows), weights * hit)

    def run(self, rows: Tensor) -> Tensor:
        hidden = torch.einsum("...nd,...dh->...nh", rows, self.w1).relu()
        return torch.einsum("...nh,...hd->...nd", hidden, self.w2[list(self.order)] if self.order else self.w2)


class _TwoLevels(nn.Module):
    """rows[E1, E2, C, D] -> [E1, E2, C, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(3, 4, 16, 20))
        self.w2 = nn.Parameter(torch.empty(3, 4, 20, 16))

    def forward(self, rows: Tensor) -> Tensor:
        return torch.einsum("...nh,...hd->...nd", torch.einsum("...nd,...dh->...nh", rows, self.w1).relu(), self.w2)


@case("multitask.two_level_places", expect="compiled")
class TwoLevelPlaces(nn.Module):
    """Rows of each sequence are dealt out to the experts of two levels in turn, which are a module of their own."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 12)
        self.experts = _TwoLevels()

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(1)
        rows = torch.einsum("bse,bsd->ebd", weights, x).unflatten(0, (3, 4))
        done = self.experts(rows).flatten(0, 1)
        return torch.einsum("bse,ebd->bsd", self.gate(x).softmax(-1), done)


def _unswapped(module: TwoLevelStacks, x: Tensor) -> Tensor:
    module.order = ()
    out = TwoLevelStacks.forward(module, x)
    del module.order
    return out


@case("multitask.two_level_stacks_swapped", expect="either", decoy=_unswapped)
class TwoLevelStacksSwapped(TwoLevelStacks):
    """The second layer's experts are taken with the groups in reverse order."""

    order = (2, 1, 0)
