"""Weighted sums of rows: the product of this package that torch has a fused kernel for, `embedding_bag`.

It reads each row once, sums in fp32 in the order given, and rounds once. T tokens, K experts per token, S slots,
N rows, D width.
"""

from __future__ import annotations

import numpy as np
import torch

from moec.backends.cpu.slots import Ints, Slots

# So few rows are widened faster than weights are split.
FEW_ROWS = 64


def bags(rows: torch.Tensor, index: torch.Tensor, starts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """rows[N, D], index[I], starts[B], weights[I] -> [B, D]: bag b is the sum of weights[i] * rows[index[i]], i from
    starts[b] to the next bag's start."""
    return torch.embedding_bag(rows, index, starts, False, 0, False, weights, False)[0]


def combine(rows: torch.Tensor, places: Ints, slots: Slots, weights: torch.Tensor) -> torch.Tensor:
    """rows[N, D], places[S], weights[T, K] -> [T, D]: each token's rows in the order of its choices.

    places[i] is the row of slot slots.order[i]. A token without slots gets zeros.
    """
    if slots.num_tokens == 1 and slots.num_slots == rows.shape[0] == slots.k:
        choice = np.empty_like(slots.order)
        choice[places] = slots.order
        return combine_one(rows, weights.reshape(-1).index_select(0, torch.from_numpy(choice)).unsqueeze(0))
    return weighted(rows, *_index(places, slots, weights))


def weighted(rows: torch.Tensor, index: torch.Tensor, starts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`bags` with weights of any floating point type."""
    narrow = rows.dtype in (torch.bfloat16, torch.float16)
    if not narrow or weights.dtype == rows.dtype:
        return bags(rows, index, starts, weights.to(rows.dtype))
    if index.numel() <= FEW_ROWS:
        return bags(rows.float(), index, starts, weights.float()).to(rows.dtype)
    # The kernel wants weights in the rows' type. Two of them, rounded value and rest, keep what fp32 weights know.
    high = weights.to(rows.dtype)
    low = weights.sub(high).nan_to_num_(0.0).to(rows.dtype)
    both = torch.stack([high, low], 1).view(-1)
    y = bags(rows, index.repeat_interleave(2), starts * 2, both)
    bad = y.isnan()
    if bool(bad.any()):
        # An infinite row times a rest of 0 is not a number: such tokens are summed anew with one weight, no others,
        # whose last bit would change.
        bad = bad.any(1)
        y[bad] = bags(rows.float(), index, starts, weights.float()).to(rows.dtype)[bad]
    return y


def _index(places: Ints, slots: Slots, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The row and the weight of each slot in the order of slots, and where each token's begin."""
    num_slots = slots.num_tokens * slots.k
    row = np.empty(num_slots, np.int64)
    if slots.all_there:
        row[slots.order] = places
        starts = np.arange(0, num_slots, slots.k)
        return torch.from_numpy(row), torch.from_numpy(starts), weights.reshape(-1)
    row.fill(-1)
    row[slots.order] = places
    held = row >= 0
    per_token = held.reshape(slots.num_tokens, slots.k).sum(1)
    starts = np.cumsum(per_token) - per_token
    return torch.from_numpy(row[held]), torch.from_numpy(starts), weights.reshape(-1)[torch.from_numpy(held)]


def combine_one(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """rows[K, D], weights[1, K] -> [1, D]: `combine` for one token whose rows lie in the order of its choices."""
    if rows.dtype in (torch.float32, torch.float64):
        return weights.to(rows.dtype) @ rows
    return (weights.float() @ rows.float()).to(rows.dtype)
