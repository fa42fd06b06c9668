"""Adversarial inputs for one cut: few and many tokens, small and huge scales, special tokens, skewed routing.

T tokens, K experts per token, E experts. Sizes named by the module itself (its integer attributes and the constants of
its code) are probed on both sides, because code that branches on the number of tokens names the number.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moec.frontends.torch.body import Body
from moec.frontends.torch.direct import Roles
from moec.frontends.torch.observe import tokens as random_tokens

COUNTS = (1, 2, 3, 5, 16, 131, 515)
_SMALLEST_NAMED, _LARGEST_NAMED = 17, 4096
_MOST_NAMED = 8
# Work above which the probes shrink: multiply-adds of one pass over all probes, and of one with very many tokens.
_BUDGET, _SMALL_BUDGET = 2e11, 4e9
_MANY = 131


def named_sizes(module: nn.Module, known: set[int]) -> list[int]:
    """Token counts just above and at the integers that the module's own code and attributes name."""
    found: set[int] = set()
    for child in module.modules():
        if not type(child).__module__.startswith("torch.nn"):
            found |= {v for v in child.__dict__.values() if type(v) is int}
            for cls in type(child).__mro__:
                if not cls.__module__.startswith(("torch.", "builtins")):
                    found |= {v for v in vars(cls).values() if type(v) is int}
                    functions = [f for f in vars(cls).values() if inspect.isfunction(f)]
                    found |= {n for f in functions for n in _numbers(f, depth=2)}
    sizes = sorted(n for n in found - known if _SMALLEST_NAMED <= n <= _LARGEST_NAMED)
    return [n + extra for n in sizes[:_MOST_NAMED] for extra in (0, 1)]


def _numbers(function: Any, depth: int) -> set[int]:
    """Integers in a function's code, in the globals it names, and in the user's functions it calls."""
    code = function.__code__
    found = {c for c in code.co_consts if type(c) is int}
    for name in code.co_names:
        value = function.__globals__.get(name)
        if type(value) is int:
            found.add(value)
        elif inspect.isfunction(value) and depth > 0 and not value.__module__.startswith("torch"):
            found |= _numbers(value, depth - 1)
    return found


def counts(module: nn.Module, body: Body, slots: int) -> list[int]:
    """Numbers of tokens to verify at, within the budget of work."""
    known = {body.inputs, body.outputs, body.experts, body.banks["w_up0"].shape[0]}
    plain = [n for n in COUNTS if n <= 5 or (n <= _MANY and work(body, slots, n) <= _BUDGET)]
    more = [n for n in (*COUNTS, *named_sizes(module, known)) if n not in plain]
    return [*plain, *(n for n in more if work(body, slots, n) * len(more) <= _SMALL_BUDGET)]


def work(body: Body, slots: int, count: int) -> int:
    """Multiply-adds of one pass over `count` tokens."""
    return count * slots * sum(math.prod(bank.shape) for bank in body.banks.values())


def is_cheap(body: Body, slots: int, count: int) -> bool:
    """Whether every pattern of routing can be afforded at this many tokens."""
    return work(body, slots, count) <= _SMALL_BUDGET


def shape_for(rank: int, count: int, width: int) -> tuple[int, ...]:
    """A shape of the rank with `count` tokens: two sequences where that comes out even."""
    if rank == 2:
        return (count, width)
    batch = 2 if count % 2 == 0 else 1
    return (*((1,) * (rank - 3)), batch, count // batch, width)


@dataclass(frozen=True)
class Maker:
    """Makes the arguments of a direct call like the one that was observed."""

    roles: Roles
    template: Mapping[str, Any]
    body: Body

    def __call__(self, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> dict[str, Any]:
        """Arguments by name for x (any rank), experts [T, K] and weights [T, K]."""
        roles, made = self.roles, dict(self.template)
        made[roles.x] = x
        count = experts.shape[0]
        lead = x.shape[:-1]
        for name, value in self.template.items():
            if name not in roles.tensors and isinstance(value, torch.Tensor):
                made[name] = self._unread(value, count, lead)
        if roles.form == "dense":
            assert roles.weights is not None
            gates = torch.zeros(count, self.body.experts, dtype=weights.dtype, device=x.device)
            gates.scatter_(1, experts, weights)
            made[roles.weights] = self._like(self.template[roles.weights], gates, lead)
            return made
        if roles.selector is not None:
            chosen = self.template[roles.selector]
            values = nn.functional.one_hot(experts, self.body.experts) if roles.form == "mask" else experts
            made[roles.selector] = self._like(chosen, values.to(chosen.dtype), lead)
        if roles.weights is not None:
            made[roles.weights] = self._like(self.template[roles.weights], weights, lead)
        return made

    def _unread(self, seen: torch.Tensor, count: int, lead: torch.Size) -> torch.Tensor:
        """Other values in a tensor that was not read, so that a call that does read it shows."""
        old = self.template[self.roles.x].shape[:-1]
        tokens, spread = old.numel(), len(old) > 1 and tuple(seen.shape[: len(old)]) == tuple(old)
        if not tokens or (not spread and (not seen.dim() or seen.shape[0] != tokens)):
            return seen
        rest = seen.shape[len(old) :] if spread else seen.shape[1:]
        rows = seen.reshape(tokens, *rest)[(torch.arange(count) + 1) % tokens]
        return rows.reshape(*(lead if spread else (count,)), *rest)

    def _like(self, seen: torch.Tensor, values: torch.Tensor, lead: torch.Size) -> torch.Tensor:
        """Values [T, ...] in the seen tensor's arrangement: tokens in one leading dimension or spread as in x."""
        count = values.shape[0]
        old = self.template[self.roles.x].shape[:-1]
        if self.roles.spread:  # what the first token of a sequence has, all of them get
            values = values.reshape(lead)
            for axis, size in enumerate(seen.shape[: len(old)]):
                values = values.narrow(axis, 0, 1) if size == 1 and old[axis] > 1 else values
            return values.reshape(*values.shape, *seen.shape[len(old) :]).to(seen.dtype)
        spread = len(old) > 1 and tuple(seen.shape[: len(old)]) == tuple(old)
        rest = seen.shape[len(old) :] if spread else seen.shape[1:]
        return values.reshape(*(lead if spread else (count,)), *rest).to(seen.dtype)

    def effective(self, made: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """experts [T, K] and weights [T, K] that these arguments ask for."""
        tokens = made[self.roles.x].numel() // self.body.inputs
        return self.roles.routing(made, tokens, self.body.experts)


def routing(count: int, slots: int, experts: int, seed: int, pattern: str) -> torch.Tensor:
    """Expert indices [T, K]: distinct within a token."""
    if pattern == "one expert":
        first = torch.full((count, 1), seed % experts)
        return (first + torch.arange(slots)) % experts
    if pattern == "round robin":
        return (torch.arange(count * slots).reshape(count, slots)) % experts
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.stack([torch.randperm(experts, generator=generator)[:slots] for _ in range(count)])
        if count
        else torch.zeros(0, slots).long()
    )


def special_rows(x: torch.Tensor, kind: str) -> torch.Tensor:
    """The same rows with the first ones made special."""
    rows = x.reshape(-1, x.shape[-1])
    if kind == "zero token":
        rows[0] = 0
    elif kind == "repeated tokens":
        rows[: max(1, rows.shape[0] // 2)] = rows[0].clone()
    elif kind == "not-a-number token":
        rows[0, 0] = float("nan")
    return x


def inputs(
    rank: int, width: int, dtype: torch.dtype, device: torch.device, sizes: list[int]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Labelled inputs: every size with mixed scales, then scales and special tokens at one size."""
    for i, count in enumerate(sizes):
        yield (
            f"{count} tokens, mixed scales",
            random_tokens(shape_for(rank, count, width), dtype, 10 + i, device=device),
        )
    longest = shape_for(rank, max(sizes), width)
    yield f"{max(sizes)} equal tokens", random_tokens((1, width), dtype, 30, device=device).expand(longest).clone()
    count = next((n for n in sizes if n >= 5), sizes[-1])
    shape = shape_for(rank, count, width)
    for scale in (0.05, 1.0, 60.0):
        yield (
            f"{count} tokens at scale {scale}",
            (random_tokens(shape, torch.float32, 40, device=device, mixed=False) * scale).to(dtype),
        )
    for kind in ("zero token", "repeated tokens", "not-a-number token"):
        yield f"{count} tokens, {kind}", special_rows(random_tokens(shape, dtype, 50, device=device), kind)
