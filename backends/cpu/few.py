"""Few tokens of small experts: sorted in Python, because each tensor op that is saved is worth more.

A tensor op costs some microseconds before it does anything, more where it did not just run: as much as a product of a
small expert. T tokens, K experts per token, S = T*K slots, D model width, O output width.
"""

from __future__ import annotations

import torch

from moec.backends.cpu.each import run_plain
from moec.backends.cpu.operands import Layer
from moec.backends.cpu.sums import combine_one, weighted


def run_few(layer: Layer, x: torch.Tensor, ids: list[int], weights: torch.Tensor) -> torch.Tensor:
    """x[T, D], ids[S] that all name an expert, weights[T, K] -> [T, O], by torch's own linear for each expert."""
    num_tokens, k = weights.shape
    if num_tokens == 1:
        return combine_one(torch.cat([run_plain(row, layer.activation, x) for row in layer.rows(ids)]), weights)
    order = sorted(range(len(ids)), key=ids.__getitem__)
    experts: list[int] = []
    counts: list[int] = []
    place = [0] * len(ids)
    for at, slot in enumerate(order):
        place[slot] = at
        if experts and experts[-1] == ids[slot]:
            counts[-1] += 1
        else:
            experts.append(ids[slot])
            counts.append(1)
    parts = x.index_select(0, torch.tensor([slot // k for slot in order], device="cpu")).split(counts)
    rows = layer.rows(experts)
    y = torch.cat([run_plain(row, layer.activation, part) for row, part in zip(rows, parts, strict=True)])
    starts = torch.arange(0, len(ids), k, device="cpu")
    return weighted(y, torch.tensor(place, device="cpu"), starts, weights.reshape(-1))
