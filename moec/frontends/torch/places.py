"""Experts that take their rows by position: one axis of a tensor counts the experts, whatever filled it.

So rows reach experts in capacity einsums, expert choice and Soft MoE, where dispatch and combination are the block's
own operations, and in dense mixtures, where every expert takes all tokens and several gates share the results.
T tokens, E experts, D inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Places:
    """The axis of x that counts experts (None: each of them takes all of x), and that of y."""

    x_axis: int | None
    y_axis: int

    def rows(self, x: torch.Tensor, experts: int) -> torch.Tensor:
        """x [.., D] -> [T, D]: expert 0's rows, then expert 1's, and so on."""
        each = x.expand(experts, *x.shape) if self.x_axis is None else x.movedim(self.x_axis, 0)
        return each.reshape(-1, x.shape[-1])

    def back(self, y: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Rows [T, O] in that order -> y in its shape."""
        sizes = list(shape)
        experts = sizes.pop(self.y_axis)
        return y.reshape(experts, *sizes).movedim(0, self.y_axis)

    def shape(self, x: Sequence[int], experts: int, outputs: int) -> tuple[int, ...]:
        """The shape of y for the shape of x."""
        rest = [n for i, n in enumerate(x) if i != self.x_axis]
        rest[-1] = outputs
        rest.insert(self.y_axis, experts)
        return tuple(rest)

    def text(self) -> str:
        """For the evidence."""
        return (
            "every expert takes all rows" if self.x_axis is None else f"axis {self.x_axis} of the rows counts experts"
        )


def placements(x: torch.Tensor, y_shape: Sequence[int], experts: int, inputs: int, outputs: int) -> Iterator[Places]:
    """Ways in which y may be the experts' results for x, by their shapes."""
    if x.dim() < 2 or x.shape[-1] != inputs:
        return
    for x_axis in (*(i for i in range(x.dim() - 1) if x.dim() > 2 and x.shape[i] == experts), None):
        for y_axis in range(len(y_shape)):
            found = Places(x_axis, y_axis)
            if len(y_shape) == x.dim() + (x_axis is None) and found.shape(x.shape, experts, outputs) == tuple(y_shape):
                yield found


def predicted(
    expert: Callable[[int, torch.Tensor], torch.Tensor], places: Places, x: torch.Tensor, experts: int
) -> torch.Tensor:
    """[T, O] in the order of `rows`, from f_e of each expert's."""
    rows = places.rows(x.float(), experts).reshape(experts, -1, x.shape[-1])
    return torch.cat([expert(e, rows[e]) for e in range(experts)])


def theirs(places: Places, y: torch.Tensor, outputs: int) -> torch.Tensor:
    """[T, O] in the order of `rows`, of a y that is there."""
    return y.movedim(places.y_axis, 0).reshape(-1, outputs).float()
