"""From chosen experts to rows sorted by expert, and to devices and back.

T tokens, K experts per token, E experts, R rows, D width, C capacity. Slot t*K + j is token t's j-th choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def group(ids: torch.Tensor, experts: int, kept: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """ids[T, K], kept bool[T*K]? -> order i32[R], offsets i32[E+1]: slots sorted by expert, stably.

    Slots with an id outside 0..E-1, and those not kept, are left out; the end of order is filled with -1.
    """
    flat = ids.flatten().long()
    inside = (flat >= 0) & (flat < experts)
    if kept is not None:
        inside &= kept
    key = torch.where(inside, flat, experts)
    order = key.sort(stable=True).indices.int()
    counts = torch.bincount(key, minlength=experts + 1)[:experts]
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    left_out = torch.arange(order.numel(), device=ids.device) >= offsets[-1]
    return order.masked_fill(left_out, -1), offsets.int()


def within_capacity(
    ids: torch.Tensor,
    weights: torch.Tensor | None,
    *,
    capacity: int,
    policy: str,
    priority: str,
    sequence: int | None,
) -> torch.Tensor:
    """ids[T, K], weights[T, K]? -> bool[T*K]: the slots among the first `capacity` of their expert and scope.

    The scope is each run of `sequence` tokens, or all of them.
    """
    num_tokens, k = ids.shape
    slots = torch.arange(ids.numel(), device=ids.device)
    # Stable sorts, the least important key first, leave equal slots in ascending order.
    order = slots
    if policy != "arrival":
        assert weights is not None, "policies by weight come with weights"
        worth = weights if policy == "weight" else weights.amax(1, keepdim=True).expand(num_tokens, k)
        worth = worth.flatten()
        order = order[(-worth.nan_to_num(0.0, float("inf"), float("-inf"))).sort(stable=True).indices]
        order = order[worth.isnan()[order].sort(stable=True).indices]
    if priority == "choice":
        order = order[(order % k).sort(stable=True).indices]
    expert = ids.flatten().long()
    scope = torch.zeros_like(expert) if sequence is None else (slots // k) // sequence
    order = order[expert[order].sort(stable=True).indices]
    order = order[scope[order].sort(stable=True).indices]
    return _rank(torch.stack([scope, expert])[:, order], order) < capacity


def _rank(keys: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """keys[..., R] in sorted order, order[R] -> [R]: how many slots with the same key come before each slot."""
    place = torch.arange(order.numel(), device=order.device)
    new = torch.ones_like(place, dtype=torch.bool)
    new[1:] = (keys[:, 1:] != keys[:, :-1]).any(0)
    start = torch.where(new, place, 0).cummax(0).values if order.numel() else place
    rank = torch.empty_like(place)
    rank[order] = place - start
    return rank


def group_chosen(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens[E, C] of expert choice -> order i32[E*C], offsets i32[E+1]: as they are."""
    experts, places = tokens.shape
    offsets = torch.arange(experts + 1, device=tokens.device, dtype=torch.int32) * places
    return tokens.flatten().int(), offsets


def gather(x: torch.Tensor, order: torch.Tensor, k: int) -> torch.Tensor:
    """x[T, D], order[R] -> [R, D]: rows[r] = x[order[r] // k], zeros where order[r] is -1."""
    if x.shape[0] == 0:
        return x.new_zeros(order.shape[0], x.shape[1])
    rows = x[order.long().clamp(min=0) // k]
    return rows.masked_fill((order < 0).unsqueeze(1), 0)


def exchange(
    rows: torch.Tensor, offsets: torch.Tensor, device_order: Sequence[int], *, back: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """rows[R, D], offsets[E+1] -> the same with the experts' segments in device order, or back in their own."""
    bounds = offsets.tolist()
    # Where the operands' i-th segment belongs: device_order[i] is the i-th expert, going back its place is i.
    sources = list(device_order)
    if back:
        sources = sorted(range(len(device_order)), key=lambda place: device_order[place])
    parts = [rows[bounds[e] : bounds[e + 1]] for e in sources]
    new = [0]
    for part in parts:
        new.append(new[-1] + part.shape[0])
    parts.append(rows.new_zeros(rows.shape[0] - bounds[-1], rows.shape[1]))
    return torch.cat(parts), torch.tensor(new, dtype=offsets.dtype, device=rows.device)
