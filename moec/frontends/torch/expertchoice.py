"""Expert choice: every expert takes tokens of its own choosing, told by their ids [E, C] and a weight for each.

y[t] = sum over e, c with ids[e, c] = t of w[e, c] * f_e(x[t]). T tokens, E experts, C places of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moec.frontends.torch.oplog import Log, Ref
from moec.frontends.torch.routing import Routing, Unusual

# Experts counted by the first axis of the ids, or by the last.
CHOSEN = ("chosen", "chosen, experts last")

# What gives positions no one of which comes twice along the axis it works on, and what moves its result about.
_DISTINCT = {"topk": 1, "sort": 1, "argsort": 0, "randperm": 0}
_MOVES = frozenset(
    [
        *("t", "transpose", "permute", "view", "_unsafe_view", "reshape", "_reshape_alias", "unsqueeze", "squeeze"),
        *("slice", "narrow", "select", "split", "chunk", "unbind", "clone", "contiguous", "_to_copy", "detach"),
    ]
)


def by_expert(form: str, ids: torch.Tensor, weights: torch.Tensor, experts: int) -> Routing:
    """ids [E, C] and weights [E, C] of a call that gives them in the form. Raises Unusual for other shapes."""
    axis = CHOSEN.index(form)
    if ids.dim() != 2 or ids.shape[axis] != experts or weights.numel() != ids.numel():
        shapes = f"{tuple(ids.shape)}, their weights {tuple(weights.shape)}"
        raise Unusual(f"the tokens that experts choose come as {shapes}")
    weights = weights.reshape(ids.shape)
    return (ids.T.contiguous(), weights.T.contiguous()) if axis else (ids.contiguous(), weights.contiguous())


def check(ids: torch.Tensor, tokens: int, *, distinct: bool) -> None:
    """Raise Unusual for ids that are no tokens, or of which an expert has one twice where it must not.

    On other devices than the CPU a look would wait for the ids.
    """
    if ids.device.type != "cpu" or not ids.numel():
        return
    low, high = torch.aminmax(ids)
    if int(low) < 0 or int(high) >= tokens:
        raise Unusual(f"experts choose tokens {int(low)}..{int(high)} of {tokens}")
    if distinct and repeats(ids):
        raise Unusual("an expert chooses a token twice")


def repeats(ids: torch.Tensor) -> bool:
    """Whether an expert has a token twice among ids [E, C]."""
    ordered = ids.sort(-1).values
    return bool((ordered[:, 1:] == ordered[:, :-1]).any())


def by_token(ids: torch.Tensor, weights: torch.Tensor, tokens: int) -> Routing:
    """The same choice as experts [T, E] and weights [T, E]: slot e of a token is expert e, or E where it chose others.

    For ids [E, C] without repeats: what an expert has twice would count once.
    """
    experts = ids.shape[0]
    every = torch.arange(experts, device=ids.device)
    chosen = torch.full((experts, tokens), experts, device=ids.device)
    chosen.scatter_(1, ids.long(), every[:, None].expand(ids.shape))
    gates = weights.new_zeros(experts, tokens).scatter_(1, ids.long(), weights)
    return chosen.T, gates.T


def slots_of(form: str, ids: torch.Tensor | None, weights: torch.Tensor, tokens: int, experts: int) -> Routing:
    """`by_expert`, then `by_token`: for what is written in terms of tokens. Raises Unusual."""
    assert ids is not None
    chosen, gates = by_expert(form, ids, weights, experts)
    check(chosen.cpu(), tokens, distinct=True)
    return by_token(chosen, gates, tokens)


def forms(ids: torch.Tensor, experts: int, tokens: int) -> Iterator[str]:
    """The forms in which integers may be the tokens that experts choose."""
    if ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool or not ids.numel():
        return
    if int(ids.min()) < 0 or int(ids.max()) >= tokens:
        return
    for axis, form in enumerate(CHOSEN):
        if ids.shape[axis] == experts and not repeats(ids.T if axis else ids):
            yield form


def never_repeats(log: Log, slot: int) -> bool:
    """Whether the ids are positions that a selection gave, each of which comes once."""
    while True:
        made = log.producer(slot)
        if made is None or log.writers(slot, len(log.entries)):
            return False
        entry = log.entries[made]
        place = _DISTINCT.get(entry.name)
        if place is not None:
            return entry.results[place] == slot
        if entry.name not in _MOVES or not entry.args or not isinstance(entry.args[0], Ref):
            return False
        slot = entry.args[0].slot
