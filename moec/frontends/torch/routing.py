"""The ways user code tells its experts which tokens they get, brought to one: experts [T, K] and weights [T, K].

An expert index E means "no expert": the slot contributes nothing. A call with another number of slots than K is
unusual.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch


class Unusual(ValueError):  # noqa: N818 - no error: the original serves such a call
    """The call's values are outside what was verified; the original code must serve it."""


class NoTokens(Unusual):
    """The call has no tokens: nothing to gain, and the original knows what an empty call means."""


Routing = tuple[torch.Tensor, torch.Tensor]
Form = Callable[[torch.Tensor | None, torch.Tensor, int, int, int], Routing]


def _slotted(values: torch.Tensor, *shape: int) -> torch.Tensor:
    if values.numel() != math.prod(shape):
        raise Unusual(f"a routing tensor has shape {tuple(values.shape)}, not {shape[1]} choices a token")
    return values.reshape(shape)


def from_indices(
    selector: torch.Tensor | None, weights: torch.Tensor, tokens: int, experts: int, slots: int
) -> Routing:
    """Expert indices and weights of the same number of slots."""
    assert selector is not None
    return _slotted(selector, tokens, slots), _slotted(weights, tokens, slots)


def from_unit_indices(
    selector: torch.Tensor | None, weights: torch.Tensor, tokens: int, experts: int, slots: int
) -> Routing:
    """Expert indices alone; every weight is one (`weights` only lends its dtype)."""
    assert selector is not None
    chosen = _slotted(selector, tokens, slots)
    return chosen, torch.ones(chosen.shape, dtype=weights.dtype, device=weights.device)


def from_mask(selector: torch.Tensor | None, weights: torch.Tensor, tokens: int, experts: int, slots: int) -> Routing:
    """A one-hot row per slot; a row of zeros is a dropped token."""
    assert selector is not None
    mask = _slotted(selector, tokens, slots, experts)
    chosen = mask == 1
    count = chosen.sum(-1)
    if bool((count > 1).any()) or bool((mask[~chosen] != 0).any()):
        raise Unusual("a row of the dispatch mask is not one-hot")
    return torch.where(count > 0, chosen.to(torch.uint8).argmax(-1), experts), _slotted(weights, tokens, slots)


def from_unit_mask(
    selector: torch.Tensor | None, weights: torch.Tensor, tokens: int, experts: int, slots: int
) -> Routing:
    """A one-hot row per token, or a row of zeros; every weight is one (`weights` only lends its dtype)."""
    ones = torch.ones(tokens, slots, dtype=weights.dtype, device=weights.device)
    return from_mask(selector, ones, tokens, experts, slots)


def from_dense(selector: torch.Tensor | None, weights: torch.Tensor, tokens: int, experts: int, slots: int) -> Routing:
    """A weight for every token and expert; zero means the expert is not asked."""
    gates = _slotted(weights, tokens, experts)
    # With one weight that is no number a token's result is none, whoever else is asked: any experts will do for it.
    lost = gates.isnan().any(-1, keepdim=True)
    gates = gates.masked_fill(lost, float("nan"))
    asked = gates != 0
    if tokens and int((asked.sum(-1) * ~lost[:, 0]).max()) > slots:
        raise Unusual(f"a token asks more than {slots} experts")
    every = torch.arange(experts, device=gates.device)
    chosen = torch.where(asked, every, experts).sort(-1).values[:, :slots]
    return chosen, gates.gather(-1, chosen.clamp(max=experts - 1)).masked_fill(chosen == experts, 0)


def from_places(selector: torch.Tensor | None, weights: torch.Tensor, tokens: int, experts: int, slots: int) -> Routing:
    """Rows in the order of their experts, equally many for each; every weight is one."""
    if tokens % experts:
        raise Unusual(f"{tokens} rows are not equally many for each of {experts} experts")
    chosen = torch.arange(experts, device=weights.device).repeat_interleave(tokens // experts)[:, None]
    return chosen, torch.ones(chosen.shape, dtype=weights.dtype, device=weights.device)


FORMS: dict[str, Form] = {
    "indices": from_indices,
    "unit": from_unit_indices,
    "mask": from_mask,
    "unit mask": from_unit_mask,
    "dense": from_dense,
    "places": from_places,
}
