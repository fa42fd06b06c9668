"""From the experts' rows back to tokens, and routing weights on the way; the sum's order is fixed.

T tokens, K experts per token, E experts, D width, R rows, C capacity.
"""

from __future__ import annotations

import torch

from moec.backends.reference.dtypes import wide


def combine(rows: torch.Tensor, order: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """rows[R, D], order[R], weights[T, K] -> [T, D]: each token's slots in the order 0..K-1, in fp32, rounded once."""
    num_tokens, k = weights.shape
    kind = wide(rows, weights)
    place = torch.full((num_tokens * k + 1,), -1, dtype=torch.long, device=rows.device)
    # Rows of no slot (-1) land in the last place, which no token reads.
    place[order.long()] = torch.arange(order.shape[0], device=rows.device)
    place = place[:-1].view(num_tokens, k)
    total = rows.new_zeros(num_tokens, rows.shape[1], dtype=kind)
    for j in range(k):
        held = (place[:, j] >= 0).nonzero().squeeze(1)
        total[held] += weights[held, j, None].to(kind) * rows[place[held, j]].to(kind)
    return total.to(rows.dtype)


def combine_chosen(rows: torch.Tensor, order: torch.Tensor, weights: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """rows[R, D], order[R] of tokens, weights[E, C] -> [T, D]: each token's rows ascending, in fp32, rounded once."""
    kind = wide(rows, weights)
    tokens, flat = order.long(), weights.flatten()
    by_token = tokens.sort(stable=True).indices
    by_token = by_token[tokens[by_token] >= 0]
    total = rows.new_zeros(num_tokens, rows.shape[1], dtype=kind)
    counts = torch.bincount(tokens[by_token], minlength=num_tokens)
    starts = counts.cumsum(0) - counts
    # One row of every token at a time, so that no two terms of a round meet in one sum.
    for turn in range(int(counts.max()) if by_token.numel() else 0):
        held = (counts > turn).nonzero().squeeze(1)
        r = by_token[starts[held] + turn]
        total[held] += flat[r, None].to(kind) * rows[r].to(kind)
    return total.to(rows.dtype)


def scale_rows(rows: torch.Tensor, order: torch.Tensor, weights: torch.Tensor, by: str) -> torch.Tensor:
    """rows[R, D], order[R], weights[T, K] or [E, C] -> [R, D]: each row times its weight, in rows' element type."""
    flat = weights.flatten().to(rows.dtype)
    if flat.numel():
        flat = flat[order.long().clamp(min=0)] if by == "token" else flat
    return (rows * flat.unsqueeze(1)).masked_fill((order < 0).unsqueeze(1), 0)


def kept_weights(weights: torch.Tensor, order: torch.Tensor, normalize: str, eps: float) -> torch.Tensor:
    """weights[T, K], order[R] -> [T, K]: zeros for slots that are not in order, the others normalized, rounded once."""
    kept = torch.zeros(weights.numel() + 1, dtype=torch.bool, device=weights.device)
    # Rows of no slot (-1) land in the last place.
    kept[order.long()] = True
    left = torch.where(kept[:-1].view(weights.shape), weights.to(wide(weights)), 0)
    if normalize == "none":
        return left.to(weights.dtype)
    total = left.sum(1, keepdim=True)
    return (left / (total + eps if normalize == "sum" else total.clamp(min=eps))).to(weights.dtype)


def identity_rows(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """x[T, D], ids[T, K], weights[T, K] -> [T, D]: x[t] times its weights for `count` experts from `first`."""
    kind = wide(x, weights)
    mine = torch.where((ids >= first) & (ids < first + count), weights.to(kind), 0)
    total = x.new_zeros(x.shape[0], dtype=kind)
    for j in range(ids.shape[1]):
        total = total + mine[:, j]
    return (x.to(kind) * total.unsqueeze(1)).to(x.dtype)


def dispatch_dense(x: torch.Tensor, weights: torch.Tensor, softmax: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """x[T, D], weights[T, E, C] -> rows[E*C, D], offsets i32[E+1]: every place is a mix of tokens, in fp32."""
    kind = wide(x, weights)
    mix = weights.to(kind).softmax(0) if softmax else weights.to(kind)
    _, experts, places = weights.shape
    offsets = torch.arange(experts + 1, device=x.device, dtype=torch.int32) * places
    return (mix.flatten(1).T @ x.to(kind)).to(x.dtype), offsets


def combine_dense(rows: torch.Tensor, weights: torch.Tensor, softmax: bool) -> torch.Tensor:
    """rows[E*C, D], weights[T, E, C] -> [T, D]: every token is a mix of all places, in fp32."""
    kind = wide(rows, weights)
    mix = weights.to(kind).flatten(1)
    return ((mix.softmax(1) if softmax else mix) @ rows.to(kind)).to(rows.dtype)
