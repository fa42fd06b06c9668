"""Fields of a block's rows that hold ids: columns whose values may not be any number.

A block that looks rows up by a column raises on random numbers. Where it takes none, columns that held nothing but
whole numbers keep to the values that were seen; all others are as random as ever. T tokens, D fields.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from moec.frontends.torch.observe import ProbeFailed
from moec.frontends.torch.observe import tokens as random_tokens


@dataclass(frozen=True)
class Fields:
    """The values that a column may have, by its place among D."""

    values: Mapping[int, torch.Tensor]

    @classmethod
    def of(cls, seen: torch.Tensor, takes: Callable[[torch.Tensor], bool]) -> Fields:
        """For rows like those `seen`, [.., D]. Raises ProbeFailed where the block `takes` none but the very ones."""
        if takes(random_tokens(seen.shape, seen.dtype, 9, device=seen.device)):
            return cls({})
        rows = seen.reshape(-1, seen.shape[-1])
        whole = [i for i in range(rows.shape[1]) if torch.equal(rows[:, i], rows[:, i].round())]
        found = cls({i: rows[:, i].unique() for i in whole})
        if not whole or not takes(found.fill(random_tokens(seen.shape, seen.dtype, 9, device=seen.device), 9)):
            raise ProbeFailed("the block does not run on random tokens")
        return found

    def fill(self, x: torch.Tensor, seed: int) -> torch.Tensor:
        """x [.., D] with such columns filled with values that were seen."""
        if not self.values:
            return x
        generator = torch.Generator().manual_seed(seed)
        x = x.clone()
        for column, values in self.values.items():
            chosen = torch.randint(len(values), x.shape[:-1], generator=generator)
            x[..., column] = values[chosen.to(values.device)]
        return x
