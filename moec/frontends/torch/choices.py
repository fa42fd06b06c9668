"""Which tensors of a block may be the choice of experts and their weights, by shape and range alone.

T tokens, K experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from moec.frontends.torch.direct import spread_over, spreads
from moec.frontends.torch.expertchoice import CHOSEN, forms, slots_of
from moec.frontends.torch.routing import FORMS

_MOST_SLOTS = 64


@dataclass(frozen=True)
class Value:
    """A tensor of a log, by its slot, with what it held when the first expert started."""

    slot: int
    value: torch.Tensor


Routing = tuple[str, "Value | None", "Value | None", int]


def routings(candidates: Sequence[Value], x: Value, tokens: int, experts: int) -> Iterator[Routing]:
    """(form, selector, weights, K) that fit by shape and range."""
    pool = [c for c in candidates if c is not x and c.value.numel() and c.value.numel() % tokens == 0]
    weights = [
        c for c in pool if c.value.is_floating_point() and c.value.numel() // tokens <= max(_MOST_SLOTS, experts)
    ]
    indices = [c for c in pool if _is_index(c.value, experts) and c.value.numel() // tokens <= _MOST_SLOTS]
    for w in weights:
        for i in indices:
            if i.value.numel() == w.value.numel():
                yield "indices", i, w, i.value.numel() // tokens
    for w in weights:
        for m in pool:
            fits = (
                m is not w
                and m.value.dim() > 1
                and m.value.shape[-1] == experts
                and m.value.numel() == w.value.numel() * experts
            )
            if fits and bool(((m.value == 0) | (m.value == 1)).all()):
                yield "mask", m, w, w.value.numel() // tokens
    yield from _alone(candidates, pool, x, tokens, experts)
    for w in weights:
        if w.value.shape[-1:] == (experts,) and w.value.numel() == tokens * experts:
            yield "dense", None, w, max(1, int((w.value.reshape(tokens, experts) != 0).sum(-1).max()))


def choices_of_experts(candidates: Sequence[Value], x: Value, tokens: int, experts: int) -> Iterator[Routing]:
    """(form, ids of tokens, weights, C) that fit by shape and range where experts choose tokens."""
    for i in candidates:
        for form in forms(i.value, experts, tokens):
            for w in candidates:
                if w is not x and w.value.is_floating_point() and w.value.numel() == i.value.numel():
                    yield form, i, w, i.value.numel() // experts


def _alone(
    candidates: Sequence[Value], pool: Sequence[Value], x: Value, tokens: int, experts: int
) -> Iterator[Routing]:
    """Choices without weights."""
    for m in pool:
        if m.value.shape[-1:] == (experts,) and m.value.numel() == tokens * experts and _is_one_hot(m.value):
            yield "unit mask", m, None, 1
    for i in candidates:
        if i is not x and _is_index(i.value, experts) and spreads(i.value, x.value.shape[:-1]):
            yield "unit", Value(i.slot, spread_over(i.value, x.value.shape[:-1]).flatten()), None, 1
    for i in pool:
        if _is_index(i.value, experts) and i.value.numel() // tokens <= _MOST_SLOTS:
            yield "unit", i, None, i.value.numel() // tokens


def _is_one_hot(value: torch.Tensor) -> bool:
    return bool(((value == 0) | (value == 1)).all()) and int((value != 0).sum(-1).max()) <= 1


def _is_index(value: torch.Tensor, experts: int) -> bool:
    whole = not value.is_floating_point() and value.dtype != torch.bool
    return whole and bool((value >= 0).all() and (value <= experts).all())


def routing_of(
    form: str,
    selector: Value | None,
    weights: Value | None,
    rows: torch.Tensor,
    tokens: int,
    experts: int,
    num_slots: int,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    try:
        given = weights.value if weights is not None else rows
        if form in CHOSEN:
            return slots_of(form, None if selector is None else selector.value, given, tokens, experts)
        return FORMS[form](None if selector is None else selector.value, given, tokens, experts, num_slots)
    except ValueError:
        return None
