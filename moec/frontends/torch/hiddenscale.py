"""A vector of each expert that multiplies its hidden values: found by where it is read, proved by values.

F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from moec.frontends.torch.activation import synthetic
from moec.frontends.torch.coordinates import moved_from
from moec.frontends.torch.linears import vector_of, view_of
from moec.frontends.torch.oplog import Log, Ref
from moec.frontends.torch.reasons import NotLifted
from moec.weights import View

Asked = Callable[[list[torch.Tensor], torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class HiddenScale:
    """Entry `entry` multiplies `data` by the tensor `slot`, whose last axis is F and which holds parameters alone.

    `view` is where the vector lies, None where it is a copy that was gathered or stacked.
    """

    entry: int
    data: int
    slot: int
    view: View | None

    @property
    def vector(self) -> View:
        """Where it lies. Raises NotLifted for a copy."""
        if self.view is None:
            raise NotLifted("the vector that multiplies an expert's hidden values is a copy made for each call")
        return self.view

    def values(self, log: Log, vector: torch.Tensor | None) -> torch.Tensor:
        """What the tensor holds when the vector [F] is as given, or ones."""
        like = log.tensors[self.slot]
        if vector is None:
            return torch.ones(like.shape, device=like.device)
        return vector.to(like.device).expand(like.shape).clone()


def read_scale(
    log: Log, middle: Collection[int], outs: Collection[int], width: int, params: Mapping[str, torch.Tensor]
) -> HiddenScale | None:
    """The one vector of parameters among the entries that multiplies what they compute from `outs`.

    None where there is none, or more than one: those stay values that nothing explains.
    """
    hidden, found = set(outs), []
    for index in sorted(middle):
        entry = log.entries[index]
        if hidden.isdisjoint(entry.reads):
            continue
        hidden.update((*entry.results, *entry.writes))
        args = [a.slot for a in entry.args if isinstance(a, Ref)]
        if entry.name not in ("mul", "mul_") or len(args) != 2:
            continue
        for slot, data in (args, args[::-1]):
            like = log.tensors[slot]
            if slot in hidden or data not in hidden or not like.dim() or like.shape[-1] != width:
                continue
            if moved_from(log, slot, index, params) is not None:
                found.append(HiddenScale(index, data, slot, vector_of(view_of(log, slot, params), width)))
    return found[0] if len(found) == 1 else None


def check_scale(ask: Asked, widths: Sequence[int], width: int, tolerance: float) -> None:
    """Refuse a vector that does more than to multiply the hidden values [F] that `ask` gives without it."""
    for seed in range(4):
        (vector,) = synthetic([width], 90 + seed)
        hidden = synthetic(widths, seed)
        mine, theirs = (ask([v.clone() for v in hidden], given) for given in (None, vector))
        mine = mine * vector.to(mine.device)
        if not torch.allclose(mine, theirs, rtol=tolerance, atol=tolerance * 1e-2):
            raise NotLifted("a vector of parameters between the experts' layers does more than scale hidden values")
