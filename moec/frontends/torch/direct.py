"""The lowest cut: a call that is nothing but y = sum_k w_k f_{e_k}(x), its arguments being x, experts and weights.

T tokens, K experts per token, E experts. Which argument is which is decided by value.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from moec.frontends.torch.binding import Binder
from moec.frontends.torch.body import Body
from moec.frontends.torch.oplog import HOST_READ, Log, Ref, Site
from moec.frontends.torch.routing import FORMS, Unusual

# Ids this far beyond the experts are other integers.
MOST_IDENTITIES = 1024


@dataclass(frozen=True)
class Roles:
    """Names of the arguments that are x, the selector (indices or a mask) and the weights; None where there is none.

    `identities` experts behind the last one return their input. `spread`: one choice holds for several tokens, such as
    for a sequence; selector and weights are expanded to x's leading sizes.
    """

    x: str
    selector: str | None
    weights: str | None
    form: str | None
    on_input: bool = False
    slots: int = 1
    scale: float = 1.0
    """A number that every weight is multiplied by."""
    identities: int = 0
    spread: bool = False

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(name for name in (self.x, self.selector, self.weights) if name is not None)

    def routing(self, bound: Mapping[str, Any], tokens: int, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """experts [T, K] and weights [T, K] of a call. Raises Unusual for values outside what was verified."""
        assert self.form is not None
        selector = None if self.selector is None else bound[self.selector]
        weights = bound[self.weights] if self.weights is not None else bound[self.x]
        if self.spread:
            lead = bound[self.x].shape[:-1]
            selector = None if selector is None else spread_over(selector, lead)
            weights = weights if self.weights is None else spread_over(weights, lead)
        chosen, weights = FORMS[self.form](selector, weights, tokens, experts, self.slots)
        return chosen, weights if self.scale == 1 else weights * self.scale


def tensors_of(log: Log, bound: Mapping[str, Any], at: int) -> dict[str, torch.Tensor]:
    """The tensors among a site's arguments, as they were when it was called."""
    found = {}
    for name, value in bound.items():
        if isinstance(value, Ref):
            tensor = log.value(value.slot, at)
            if tensor is not None:
                found[name] = tensor
    return found


def fit_roles(log: Log, site: Site, body: Body, params: Mapping[str, torch.Tensor], *, routed: bool) -> Roles | None:
    """The roles under which the body gives the site's result, or None."""
    if not isinstance(site.result, Ref):
        return None
    theirs = log.value(site.result.slot, site.end)
    binder = Binder(getattr(site.module, site.method))
    bound = tensors_of(log, binder(site.args, site.kwargs), site.start)
    if theirs is None or not theirs.is_floating_point():
        return None
    bound = {name: tensor for name, tensor in bound.items() if tensor.device == theirs.device}
    for roles in _hypotheses(bound, body, routed=routed):
        x = bound[roles.x]
        tokens = x.numel() // body.inputs
        if theirs.numel() != tokens * body.outputs:
            continue
        mine = _predict(body, params, roles, bound, tokens)
        if mine is None:
            continue
        loose = 1e-4 if theirs.dtype in (torch.float32, torch.float64) else 4e-2
        for scale in [1.0] if roles.on_input or not roles.form else factors(log, site.start, site.end):
            if near(mine * scale, theirs.reshape(tokens, -1).float(), loose):
                return replace(roles, scale=scale) if others_unread(log, site, roles.tensors) else None
    return None


def factors(log: Log, start: int, end: int) -> list[float]:
    """What a result may be multiplied by: 1, and numbers that these entries multiply tensors by."""
    numbers = [
        arg
        for entry in log.entries[start:end]
        if entry.name in ("mul", "mul_")
        for arg in entry.args
        if isinstance(arg, float) and arg not in (0.0, 1.0)
    ]
    return [1.0, *dict.fromkeys(numbers)]


def near(mine: torch.Tensor, theirs: torch.Tensor, bar: float) -> bool:
    """Relative L2 of each row within `bar`, so that rows of a large scale do not hide those of a small one.

    Two zeros are not evidence of anything.
    """
    norm, gap = theirs.norm(dim=-1), (mine - theirs).norm(dim=-1)
    return bool(torch.isfinite(norm).all() and (norm > 0).any() and (gap <= bar * norm).all())


def _predict(
    body: Body, params: Mapping[str, torch.Tensor], roles: Roles, bound: Mapping[str, Any], tokens: int
) -> torch.Tensor | None:
    x = bound[roles.x].reshape(tokens, -1)
    body = replace(body, identities=roles.identities)
    if roles.form is None:
        one = torch.zeros(tokens, 1, dtype=torch.int64, device=x.device)
        return body.evaluate(params, x, one, torch.ones(tokens, 1, device=x.device))
    try:
        experts, weights = roles.routing(bound, tokens, body.experts)
    except ValueError:
        return None
    return body.evaluate(params, x, experts, weights, on_input=roles.on_input)


def _hypotheses(bound: Mapping[str, torch.Tensor], body: Body, *, routed: bool) -> Iterator[Roles]:
    floats = [n for n, t in bound.items() if t.is_floating_point()]
    for x in floats:
        if not bound[x].dim() or bound[x].shape[-1] != body.inputs or not bound[x].numel():
            continue
        tokens = bound[x].numel() // body.inputs
        if not routed:
            yield Roles(x, None, None, None)
            continue
        for on_input in (False, True):
            others = [n for n in floats if n != x]
            for roles in _routed(bound, x, others, tokens, body, on_input):
                yield from _with_identities(roles, bound, body)
        yield from _spread(bound, x, tokens, body)


def _with_identities(roles: Roles, bound: Mapping[str, torch.Tensor], body: Body) -> Iterator[Roles]:
    """The roles, and where ids beyond the experts are given the same with identity experts for those."""
    beyond = 0
    if roles.form in ("indices", "unit") and roles.selector is not None:
        beyond = int(bound[roles.selector].max()) + 1 - body.experts
    if beyond <= 1:  # the id E alone may also mean no expert
        yield roles
    if beyond >= 1 and body.inputs == body.outputs:
        yield replace(roles, identities=beyond)
    if beyond >= 2 and body.inputs == body.outputs:  # the last id means no expert
        yield replace(roles, identities=beyond - 1)


def _spread(bound: Mapping[str, torch.Tensor], x: str, tokens: int, body: Body) -> Iterator[Roles]:
    """One choice for all the tokens of a sequence, with a weight of its own or without."""
    lead = bound[x].shape[:-1]
    fitting = [n for n, t in bound.items() if n != x and t.numel() < tokens and spreads(t, lead)]
    for selector in fitting:
        if not _is_index(bound[selector], body.experts - 1):
            continue
        for weights in (n for n in fitting if bound[n].is_floating_point()):
            for on_input in (False, True):
                yield Roles(x, selector, weights, "indices", on_input, spread=True)
        yield Roles(x, selector, None, "unit", spread=True)


def spreads(values: torch.Tensor, lead: torch.Size) -> bool:
    try:
        return len(lead) == 2 and values.numel() > 0 and spread_over(values, lead).shape == lead
    except Unusual:
        return False


def spread_over(values: torch.Tensor, lead: torch.Size) -> torch.Tensor:
    """Values [...] or [..., 1] expanded to the leading sizes of x. Raises Unusual where they do not broadcast."""
    if values.dim() == len(lead) + 1 and values.shape[-1] == 1:
        values = values.squeeze(-1)
    if values.dim() != len(lead):
        raise Unusual(f"a routing tensor of shape {tuple(values.shape)} is not spread over {tuple(lead)}")
    try:
        return values.expand(lead)
    except RuntimeError:
        raise Unusual(f"a routing tensor of shape {tuple(values.shape)} is not spread over {tuple(lead)}") from None


def _is_index(values: torch.Tensor, highest: int | None) -> bool:
    """Whether they can be ids of experts, up to `highest` where there is one."""
    if values.is_floating_point() or values.dtype == torch.bool or not values.numel():
        return False
    low, high = torch.aminmax(values)
    return int(low) >= 0 and (highest is None or int(high) <= highest)


def _routed(
    bound: Mapping[str, torch.Tensor], x: str, floats: list[str], tokens: int, body: Body, on_input: bool
) -> Iterator[Roles]:
    experts = body.experts
    others = [n for n in bound if n != x and bound[n].numel() % tokens == 0]
    for selector in others:
        values = bound[selector]
        is_index = _is_index(values, MOST_IDENTITIES + experts if body.inputs == body.outputs else experts)
        for weights in floats:
            if is_index and weights != selector and bound[weights].numel() == values.numel():
                yield Roles(x, selector, weights, "indices", on_input, values.numel() // tokens)
            masked = (
                values.dim() > 1 and values.shape[-1] == experts and values.numel() == bound[weights].numel() * experts
            )
            if masked and weights != selector:
                yield Roles(x, selector, weights, "mask", on_input, bound[weights].numel() // tokens)
        if is_index and not on_input:
            yield Roles(x, selector, None, "unit", False, values.numel() // tokens)
    for weights in floats:
        if bound[weights].shape[-1:] == (experts,) and bound[weights].numel() == tokens * experts:
            asked = (bound[weights].reshape(tokens, experts) != 0).sum(-1)
            yield Roles(x, None, weights, "dense", on_input, max(1, int(asked.max())))


def others_unread(log: Log, site: Site, names: Collection[str]) -> bool:
    """Whether tensor arguments other than these are not read inside."""
    binder = Binder(getattr(site.module, site.method))
    bound = binder(site.args, site.kwargs)
    spare = {v.slot for n, v in bound.items() if isinstance(v, Ref) and n not in names}
    return not any(spare & set(e.reads) for e in log.entries[site.start : site.end] if e.op != HOST_READ)


def steering_reads(log: Log, site: Site, values: Collection[int]) -> str | None:
    """Why the call may not be replaced: a value computed from `values` is read on the host, Python may branch on it."""
    storages = {log.storages[slot] for slot in values}
    for entry in log.entries[site.start : site.end]:
        if entry.op != HOST_READ:
            continue
        behind = log.closure([(slot, entry.index) for slot in entry.reads], start=site.start)
        touched = {s for i in behind for s in log.entries[i].reads}.union(entry.reads)
        if any(log.storages[s] in storages for s in touched):
            return f"{site.label} reads a value computed from its input on the host and may branch on it"
    return None
