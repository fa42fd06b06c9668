"""Weights of experts that are put together without a copy: joined, selected, read one expert at a time.

E experts, N outputs, C inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

Experts = torch.Tensor | Sequence[torch.Tensor]
"""The weights of E experts: one tensor [E, ...] or E tensors."""


class Joined(Sequence[torch.Tensor]):
    """Weights one after the other along `axis`, where they lie; joined when asked, and only the expert asked for."""

    def __init__(self, parts: Sequence[Experts], axis: int) -> None:
        self.parts, self.axis = tuple(parts), axis

    def __len__(self) -> int:
        return sum(map(len, self.parts)) if self.axis == 0 else len(self.parts[0])

    def __getitem__(self, index: int) -> torch.Tensor:  # type: ignore[override]
        pieces = self.pieces(index)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def pieces(self, index: int) -> tuple[torch.Tensor, ...]:
        """Tensors whose rows, one after the other, are the expert's."""
        if self.axis == 0:
            for part in self.parts:
                if index < len(part):
                    return pieces_of(part, index)
                index -= len(part)
            raise IndexError(index)
        if self.axis == 1:
            return tuple(piece for part in self.parts for piece in pieces_of(part, index))
        return (torch.cat([part[index] for part in self.parts], dim=self.axis - 1),)


class Selected(Sequence[torch.Tensor]):
    """The experts named, in this order, where they lie."""

    def __init__(self, source: Experts, experts: Sequence[int]) -> None:
        self.source, self.experts = source, tuple(experts)

    def __len__(self) -> int:
        return len(self.experts)

    def __getitem__(self, index: int) -> torch.Tensor:  # type: ignore[override]
        return self.source[self.experts[index]]

    def pieces(self, index: int) -> tuple[torch.Tensor, ...]:
        """Tensors whose rows, one after the other, are the expert's."""
        return pieces_of(self.source, self.experts[index])


def pieces_of(weights: Experts, expert: int) -> tuple[torch.Tensor, ...]:
    """Tensors whose rows, one after the other, are the expert's: two where gate and up are joined but lie apart."""
    return weights.pieces(expert) if isinstance(weights, Joined | Selected) else (weights[expert],)


def matrix_pieces(w: Experts) -> tuple[torch.Tensor, ...]:
    """[N, C] as tensors whose rows, one after the other, are its rows."""
    if isinstance(w, torch.Tensor):
        return (w,)
    if isinstance(w, Joined) and w.axis == 0:
        return tuple(piece for part in w.parts for piece in matrix_pieces(part))
    return (whole(w),)


def whole(weights: Experts) -> torch.Tensor:
    """One tensor; a copy where the weights lie apart, made expert by expert, so that nothing larger ever exists."""
    if isinstance(weights, torch.Tensor):
        return weights
    if isinstance(weights, Joined):
        return torch.cat([whole(part) for part in weights.parts], dim=weights.axis)
    first = weights[0]
    result = first.new_empty(len(weights), *first.shape)
    for e in range(len(weights)):
        result[e] = weights[e]
    return result


def shape_of(weights: Experts) -> tuple[int, ...]:
    """The shape that `whole` would have."""
    if isinstance(weights, torch.Tensor):
        return tuple(weights.shape)
    if isinstance(weights, Joined):
        shapes = [shape_of(part) for part in weights.parts]
        length = sum(shape[weights.axis] for shape in shapes)
        return (*shapes[0][: weights.axis], length, *shapes[0][weights.axis + 1 :])
    return (len(weights), *weights[0].shape)
