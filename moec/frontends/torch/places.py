"""Experts that take their rows by position: one axis of a tensor counts the experts, whatever filled it.

So rows reach experts in capacity einsums, expert choice and Soft MoE, where dispatch and combination are the block's
own operations, and in dense mixtures, where every expert takes all tokens and several gates share the results.
T tokens, E experts, D inputs, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Places:
    """The axis of x that counts experts (None: each of them takes all of x), and that of y.

    `sizes`: experts at several levels are counted by as many axes of these sizes, which begin there.
    """

    x_axis: int | None
    y_axis: int
    sizes: tuple[int, ...] = ()

    @property
    def span(self) -> int:
        """How many axes count experts."""
        return max(1, len(self.sizes))

    def counted(self, x: Sequence[int], experts: int) -> bool:
        """Whether x of this shape has rows for so many experts."""
        axis = self.x_axis
        return axis is None or tuple(x[axis : axis + self.span]) == (self.sizes or (experts,))

    def rows(self, x: torch.Tensor, experts: int) -> torch.Tensor:
        """x [.., D] -> [T, D]: expert 0's rows, then expert 1's, and so on."""
        each = x.expand(experts, *x.shape) if self.x_axis is None else self.first(x, self.x_axis)
        return each.reshape(-1, x.shape[-1])

    def first(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """The tensor with the axes that count experts in front."""
        return x.movedim(tuple(range(axis, axis + self.span)), tuple(range(self.span)))

    def back(self, y: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Rows [T, O] in that order -> y in its shape."""
        ends = (self.y_axis, self.y_axis + self.span)
        first = (*shape[ends[0] : ends[1]], *shape[: ends[0]], *shape[ends[1] :])
        return y.reshape(first).movedim(tuple(range(self.span)), tuple(range(*ends)))

    def shape(self, x: Sequence[int], experts: int, outputs: int) -> tuple[int, ...]:
        """The shape of y for the shape of x."""
        counted = () if self.x_axis is None else range(self.x_axis, self.x_axis + self.span)
        rest = [n for i, n in enumerate(x) if i not in counted]
        rest[-1] = outputs
        rest[self.y_axis : self.y_axis] = self.sizes or (experts,)
        return tuple(rest)

    def text(self) -> str:
        """For the evidence."""
        if self.x_axis is None:
            return "every expert takes all rows"
        if self.sizes:
            last = self.x_axis + self.span - 1
            return f"axes {self.x_axis} to {last} of the rows count experts, {' x '.join(map(str, self.sizes))}"
        return f"axis {self.x_axis} of the rows counts experts"


def placements(x: torch.Tensor, y_shape: Sequence[int], experts: int, inputs: int, outputs: int) -> Iterator[Places]:
    """Ways in which y may be the experts' results for x, by their shapes."""
    if x.dim() < 2 or x.shape[-1] != inputs:
        return
    one = [(i, ()) for i in range(x.dim() - 1) if x.dim() > 2 and x.shape[i] == experts]
    two = [(i, tuple(x.shape[i : i + 2])) for i in range(x.dim() - 3) if _counts(x.shape[i : i + 2], experts)]
    for x_axis, sizes in (*one, *two, (None, ())):
        for y_axis in range(len(y_shape)):
            found = Places(x_axis, y_axis, sizes)
            if len(y_shape) == x.dim() + (x_axis is None) and found.shape(x.shape, experts, outputs) == tuple(y_shape):
                yield found


def _counts(sizes: Sequence[int], experts: int) -> bool:
    return min(sizes) > 1 and math.prod(sizes) == experts


def predicted(
    expert: Callable[[int, torch.Tensor], torch.Tensor], places: Places, x: torch.Tensor, experts: int
) -> torch.Tensor:
    """[T, O] in the order of `rows`, from f_e of each expert's."""
    rows = places.rows(x.float(), experts).reshape(experts, -1, x.shape[-1])
    return torch.cat([expert(e, rows[e]) for e in range(experts)])


def theirs(places: Places, y: torch.Tensor, outputs: int) -> torch.Tensor:
    """[T, O] in the order of `rows`, of a y that is there."""
    return places.first(y, places.y_axis).reshape(-1, outputs).float()
