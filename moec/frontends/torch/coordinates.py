"""Which parameter element stands where in an operand that was gathered, stacked or permuted from expert weights.

The data movement is run again on element numbers instead of weights, and the numbers are read off. Nothing is assumed
about how the user's code lays out a batched product.

E experts, N outputs, C inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moec.frontends.torch.oplog import Log
from moec.frontends.torch.reasons import NotLifted
from moec.frontends.torch.replay import replay
from moec.weights import View

MOVES = frozenset(
    [
        "t",
        "transpose",
        "permute",
        "view",
        "_unsafe_view",
        "reshape",
        "expand",
        "unsqueeze",
        "squeeze",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "chunk",
        "unbind",
        "index",
        "index_select",
        "embedding",
        "clone",
        "contiguous",
        "stack",
        "cat",
        "alias",
        "detach",
        "as_strided",
        "narrow",
        "flatten",
        "repeat",
        "repeat_interleave",
        "_reshape_alias",
    ]
)
_SHIFT = 40
_LARGEST = 1 << 26


def moved_from(log: Log, slot: int, at: int, weights: Mapping[str, torch.Tensor]) -> set[int] | None:
    """Entries that move elements of `weights` into the slot; None when anything else had a part in it."""
    entries: set[int] = set()
    todo = [slot]
    leaves = 0
    while todo:
        current = todo.pop()
        made = log.producer(current)
        if made is None:
            if log.param_of(current) not in weights:
                return None
            leaves += 1
            continue
        entry = log.entries[made]
        if entry.name not in MOVES or log.writers(current, at):
            return None
        if made not in entries:
            entries.add(made)
            data = entry.args[0]
            todo += [ref.slot for ref in data] if isinstance(data, (list, tuple)) else [data.slot]
    return entries if leaves else None


@dataclass(frozen=True)
class Operand:
    """Element numbers of an operand: `owner` is a position in `names`, `offset` the element within that parameter."""

    names: tuple[str, ...]
    owner: torch.Tensor
    offset: torch.Tensor


def number(log: Log, slot: int, entries: set[int], params: Mapping[str, torch.Tensor]) -> Operand:
    """Run the movement on element numbers."""
    reads = {s for i in entries for s in log.entries[i].reads} | {slot}
    leaves = [s for s in sorted(reads) if log.producer(s) is None and log.param_of(s) in params]
    names = tuple(str(log.param_of(s)) for s in leaves)
    if log.tensors[slot].numel() > _LARGEST or any(params[n].numel() > _LARGEST for n in names):
        raise NotLifted(
            "weights are gathered into a batch too large to follow; such code computes slower than a loop over experts"
        )
    given = {}
    for i, (leaf, name) in enumerate(zip(leaves, names, strict=True)):
        tensor, param = log.tensors[leaf], params[name]
        numbers = torch.arange(param.untyped_storage().nbytes() // param.element_size(), device=tensor.device)
        start, base = int(tensor.storage_offset()), int(param.storage_offset())
        codes = numbers.as_strided(tensor.shape, tensor.stride(), start) - base
        given[leaf] = codes + (i << _SHIFT)
    codes = (replay(log, entries, given, slot) if entries else given[slot]).cpu()
    return Operand(names, codes >> _SHIFT, codes & ((1 << _SHIFT) - 1))


@dataclass(frozen=True)
class Line:
    """Numbers along one axis: feature index of each position, and each position's expert."""

    base: int
    step: int
    length: int
    feature: torch.Tensor
    expert: torch.Tensor

    @staticmethod
    def even(base: int, step: int, length: int) -> Line:
        """One expert's features in order."""
        return Line(base, step, length, torch.arange(length), torch.zeros(length, dtype=torch.int64))


@dataclass(frozen=True)
class Stack:
    """How experts lie in the parameters of an operand: one stacked parameter, or one parameter each."""

    names: tuple[str, ...]
    size: int

    def split(self, operand: Operand) -> tuple[torch.Tensor, torch.Tensor]:
        """Expert and element within the expert."""
        if len(self.names) == 1:
            return operand.offset // self.size, operand.offset % self.size
        return operand.owner, operand.offset

    def views(self, count: int, base: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[View, ...]:
        if len(self.names) == 1:
            return tuple(View(self.names[0], e * self.size + base, shape, stride) for e in range(count))
        return tuple(View(name, base, shape, stride) for name in self.names)


def stack_of(operand: Operand, params: Mapping[str, torch.Tensor]) -> tuple[Stack, int]:
    """The stack and its number of experts."""
    if len(operand.names) == 1:
        param = params[operand.names[0]]
        if param.dim() < 2 or not param.is_contiguous():
            raise NotLifted(f"parameter {operand.names[0]!r} is not a stack of experts")
        return Stack(operand.names, param.stride(0)), param.shape[0]
    shapes = {params[n].shape for n in operand.names}
    if len(shapes) > 1:
        raise NotLifted("experts differ in width")
    return Stack(operand.names, 0), len(operand.names)


def line(expert: torch.Tensor, element: torch.Tensor, axis: int) -> Line:
    """The numbers along `axis` at index 0 of all others."""
    index = [0] * element.dim()
    along = tuple(slice(None) if i == axis % element.dim() else j for i, j in enumerate(index))
    experts, elements = expert[along], element[along]
    own = elements[experts == experts[0]]
    base = int(own.min())
    steps = own.sort().values.diff()
    step = int(steps[0]) if len(steps) else 1
    if len(steps) and (step <= 0 or not bool((steps == step).all())):
        raise NotLifted("an expert's weights are not evenly spaced in the batched product")
    return Line(base, step, len(own), (elements - base) // step, experts)
