"""Which expert has which slots, worked out on small integers with numpy: ten times less overhead than tensor ops.

T tokens, K experts per token, E experts, H hit experts, S slots that have an expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

# Up to so many slots, Python sorts sooner than arrays, whose every operation costs microseconds whatever its size; and
# rows gain nothing from lying sorted by expert.
FEW_SLOTS = 64

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Slots:
    """Slot t*K + j is token t's j-th choice; one whose id is outside 0..E-1 has no expert and is left out.

    order[S]: the other slots sorted by expert, stably. hit[H]: the experts that have any, ascending; counts[H]: how
    many.
    """

    num_tokens: int
    k: int
    order: Ints
    hit: Ints
    counts: Ints

    @property
    def num_slots(self) -> int:
        """S."""
        return int(self.order.size)

    @property
    def all_there(self) -> bool:
        """Whether no slot was left out."""
        return self.order.size == self.num_tokens * self.k

    @property
    def in_order(self) -> bool:
        """Whether every token has one choice, and the tokens come sorted by expert."""
        return self.k == 1 and self.all_there and bool((self.order == np.arange(self.num_tokens)).all())

    @property
    def tokens(self) -> Ints:
        """[S]: the token of each slot, in the order of `order`."""
        return self.order // self.k

    @property
    def starts(self) -> Ints:
        """[H]: where each expert's slots start in `order`."""
        return np.cumsum(self.counts) - self.counts


def find_slots(ids: torch.Tensor, num_experts: int) -> Slots:
    """ids int32 or int64 [T, K] -> the slots of each expert."""
    num_tokens, k = ids.shape
    flat = ids.reshape(-1).numpy()
    # As unsigned numbers, negative ids are large: one comparison finds both kinds of "no expert".
    unsigned = flat.view(np.uint32 if flat.dtype == np.int32 else np.uint64)
    small = np.uint8 if num_experts < 2**8 else np.uint16 if num_experts < 2**16 else np.uint32
    if flat.size and int(unsigned.max()) >= num_experts:
        key = np.minimum(unsigned, num_experts).astype(small)
        counts = np.bincount(key, minlength=num_experts + 1)[:num_experts]
    else:
        key = flat.astype(small)
        counts = np.bincount(key, minlength=num_experts)
    # numpy sorts integers of 8 and 16 bits by radix.
    order = np.argsort(key, kind="stable")[: int(counts.sum())]
    hit = np.flatnonzero(counts)
    return Slots(num_tokens, k, order, hit, counts[hit])


def listed(ids: torch.Tensor, num_experts: int) -> list[int]:
    """Few ids as Python numbers, where every one is an expert's; else none."""
    if not 0 < ids.numel() <= FEW_SLOTS:
        return []
    found: list[int] = ids.reshape(-1).tolist()
    return found if min(found) >= 0 and max(found) < num_experts else []
