"""Naming what a router with a capacity does: who is kept, in which order, of what, and what a dropped slot costs.

A reading is a way to route and to drop; each is an IR region, run by the reference back end on logits that crowd the
experts, and must give the block's own result on every one of them. Where none does, or two do, nothing is named.
T tokens, B sequences, S positions, E experts, K experts per token, C capacity.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace

import torch

from moec.backendbase import Executable, load_backend
from moec.frontends.torch.capacitysize import Capacity, capacities, told_apart_at
from moec.frontends.torch.crowd import Crowd, Ran, Unseen, gates
from moec.frontends.torch.crowdlogits import crowds, noise, skewed
from moec.frontends.torch.instances import NotLifted
from moec.frontends.torch.manner import Limits, Manner
from moec.frontends.torch.observe import ProbeFailed
from moec.frontends.torch.probing import work
from moec.ir import Builder, Tensor
from moec.weights import WeightStore

_LENGTHS = (*range(1, 14), 15, 16, 17, 20, 24, 31, 32, 33, 48, 64, 65, 100, 128, 200)
_LONGEST = 520
# Sizes at which the code's floats could round otherwise than fractions do, and rounds of telling sizes apart.
_WHOLE, _APART = 12, 6
# Multiply-adds of all experts on all tokens of one run.
_BUDGET = 4e9
_NO_SUM = "its result is no sum of the results of the experts that the router's logits choose"


@dataclass
class _Reader:
    """One reading, ready to run on logits."""

    manner: Manner
    capacity: Capacity
    experts: int
    module: torch.nn.Module
    built: Executable = field(init=False)

    def __post_init__(self) -> None:
        b = Builder("reading")
        logits = b.input("logits", Tensor.of("f32", "T", self.experts))
        self.built = load_backend("reference").build(
            b.build(*self.manner.add(b, logits, self.experts, self.capacity)), WeightStore(self.module, {}), {}
        )

    def gates(self, logits: torch.Tensor) -> torch.Tensor:
        """[B, S, E] -> [T, E]: the weight of each expert's result."""
        flat = logits.reshape(-1, logits.shape[-1])
        more = (torch.ones(logits.shape[1], dtype=torch.bool),) if self.manner.scope == "sequence" else ()
        weights, ids, order, _ = self.built(flat, *more)
        kept = torch.zeros(weights.numel(), dtype=torch.bool)
        kept[order[order >= 0].long()] = True
        held = torch.where(kept.view(weights.shape), weights, 0.0)
        return torch.zeros(flat.shape).scatter_add(1, ids.long(), held)


def find_limits(crowd: Crowd) -> Limits | None:
    """The reading that explains the block on every crowd; None where it never drops a slot.

    Raises Unseen with the reason where that cannot be seen, and NotLifted where it drops some and no reading, or more
    than one, explains which.
    """
    _check_distinct(crowd)
    kept = _kept_of_one(crowd)
    if kept is None:
        return None
    capacity = _capacity(crowd, kept)
    readings = [
        _Reader(manner, capacity, crowd.body.experts, crowd.driver.module) for manner in _manners(crowd, capacity)
    ]
    if not readings:
        raise NotLifted("the weights of its choices follow from no score of the router's logits")
    ties = True
    rivals = readings
    for label, logits in crowds(crowd.body.experts, capacity, by_sequence=crowd.by_sequence):
        try:
            ran = crowd.run(logits)
        except ProbeFailed:  # sizes that the code itself refuses
            continue
        ends = [(reading, _explains(crowd, ran, reading.gates(logits))) for reading in readings]
        left = [(reading, end) for reading, end in ends if end is not None]
        if left:
            # Sums with and without the weights may both be there: the later one says more.
            readings = [reading for reading, _ in sorted(left, key=lambda one: -one[1])]
            last = max(end for _, end in left)
            rivals = [reading for reading, end in left if end == last]
        elif label == "ties":
            ties = False
        else:
            shape = f"{_many(logits.shape[0], 'sequence')} of {_many(logits.shape[1], 'token')}"
            raise NotLifted(f"which tokens are dropped is explained by no order or scope at {shape}, {label}")
    if len({_function(reading.manner) for reading in rivals}) > 1:
        raise NotLifted(f"two readings of it explain every probe: {_apart(rivals[0].manner, rivals[1].manner)}")
    return Limits(rivals[0].manner, capacity, crowd.runs, ties)


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count != 1 else ''}"


def _apart(one: Manner, other: Manner) -> str:
    """The attributes in which two readings differ."""
    pairs = ((f.name, getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    return ", ".join(f"{name}={mine} or {theirs}" for name, mine, theirs in pairs if mine != theirs)


def _function(manner: Manner) -> Manner:
    """The same for readings that are one function: the sum of the largest scores is too far from zero for an eps."""
    return manner if manner.kept != "none" or manner.normalize == "none" else replace(manner, normalize="sum", eps=0.0)


def _check_distinct(crowd: Crowd) -> None:
    """Raise Unseen where two experts give the same: which of them served a token cannot be seen then."""
    rows = torch.randn(4, crowd.body.inputs, generator=torch.Generator().manual_seed(5))
    every = crowd.results(rows).flatten(0, 1).T
    apart = torch.cdist(every, every) + torch.eye(len(every)) * every.norm()
    if bool((apart <= 1e-4 * every.norm(dim=1)).any()) or bool((every.norm(dim=1) == 0).any()):
        raise Unseen("two of its experts compute the same, as copies do before they are trained")


def _affordable(crowd: Crowd, tokens: int) -> bool:
    return work(crowd.body, crowd.body.experts, tokens) <= _BUDGET


def _gates(crowd: Crowd, logits: torch.Tensor) -> list[torch.Tensor]:
    """[B, S, E] -> [T, E], in each sum of experts' results that the block makes, what they are multiplied by.

    The latest sum comes first; partial sums are left out. Empty where there is none.
    """
    ran = crowd.run(logits)
    flat = logits.reshape(-1, logits.shape[-1])
    for rows in ran.given():
        results = crowd.results(rows)
        found = [one for y in ran.wide(crowd.body.outputs) if (one := gates(results, y, flat)) is not None]
        most = max((int((one != 0).sum()) for one in found), default=0)
        if found:
            return [one for one in reversed(found) if int((one != 0).sum()) == most]
    return []


def _kept_of_one(crowd: Crowd) -> dict[int, int] | None:
    """By number of tokens, how many slots an expert kept that all tokens chose; None where it kept all."""
    found: dict[int, int] = {}
    for tokens in sorted(_LENGTHS, reverse=True):
        if _affordable(crowd, tokens):
            try:
                found[tokens] = _kept_at(crowd, tokens)
            except ProbeFailed:  # a size that the code itself refuses
                if not found:
                    raise
                continue
            if len(found) == 4 and all(n == t for t, n in found.items()):
                return None
    if not any(found.values()):
        raise Unseen(_NO_SUM)
    return found if any(n < t for t, n in found.items()) else None


def _kept_at(crowd: Crowd, tokens: int) -> int:
    found = _gates(crowd, skewed(tokens, crowd.body.experts))
    if not found:
        raise Unseen(_NO_SUM)
    return int((found[0][:, 0] != 0).sum())


def _capacity(crowd: Crowd, kept: dict[int, int]) -> Capacity:
    """The capacity as a size, other sizes tried until what would explain the counts is told apart."""
    most = max(t for t in range(1, _LONGEST + 1) if _affordable(crowd, t))
    apart = 0
    while True:
        found = capacities(kept, crowd.body.experts)
        if not found:
            counts = ", ".join(f"{kept[t]} of {t}" for t in sorted(kept)[-4:])
            raise NotLifted(f"an expert that all tokens choose keeps {counts}, which is no size of the tokens")
        step = found[0].delicate
        whole = () if step is None else range(step, min(most, _WHOLE * step) + 1, step)
        more = next((tokens for tokens in whole if tokens not in kept), None)
        if more is None and apart < _APART:
            apart += 1
            more = told_apart_at(found, kept, most)
        if more is None:
            return found[0]
        kept[more] = _kept_at(crowd, more)


def _manners(crowd: Crowd, capacity: Capacity) -> list[Manner]:
    """Readings whose weights are those of a run in which choices are spread evenly."""
    experts = crowd.body.experts
    count = 4 * experts
    place = (torch.arange(experts)[None] - torch.arange(count)[:, None]) % experts
    logits = (-1.5 * place + 0.3 * noise(1, count, experts, seed=3)[0])[None]
    found = _gates(crowd, logits)
    if not found:
        return []
    k = int((found[0] != 0).sum(1).max())
    if not 1 <= k < experts or 2 * k > crowd.body.outputs:
        return []
    scopes = ("batch", "sequence") if crowd.by_sequence else ("batch",)
    policies = ("arrival", "weight") if k == 1 else ("arrival", "weight", "token_weight")
    drops = itertools.product(scopes, ("token",) if k == 1 else ("token", "choice"), policies)
    wide = replace(capacity, reading=None, least=count)
    fitting = []
    for manner in _weights(crowd, k):
        mine = _Reader(manner, wide, experts, crowd.driver.module).gates(logits).double()
        if any(torch.allclose(torch.where(one != 0, mine, 0.0), one, rtol=1e-3, atol=1e-6) for one in found):
            fitting.append(manner)
    return [
        replace(manner, scope=scope, priority=priority, policy=policy)
        for (scope, priority, policy), manner in itertools.product(drops, fitting)
        if policy == "arrival" or manner.score != "softmax_chosen"  # weights that are all one say nothing
    ]


def _weights(crowd: Crowd, k: int) -> Iterator[Manner]:
    """Ways from logits to weights, plain ones first."""
    for score in ("softmax", "sigmoid", "identity"):
        yield Manner(k, score)
        if k == 1:
            continue
        for normalize, eps in (("sum", 0.0), *(("clamped_sum", eps) for eps in _small(crowd))):
            yield Manner(k, score, normalize=normalize, eps=eps)
        for normalize, eps in itertools.product(("sum", "clamped_sum"), (0.0, *_small(crowd))):
            yield Manner(k, score, kept=normalize, eps=eps)
    if k == 1:  # of more choices it is the same function as softmax and a sum
        yield Manner(k, "softmax_chosen")


def _small(crowd: Crowd) -> tuple[float, ...]:
    """Numbers in the block's operations that could keep a sum from zero."""
    log = crowd.run(noise(1, 4, crowd.body.experts, seed=1)).log
    given = (v for entry in log.entries for v in (*entry.args, *entry.kwargs.values()))
    return tuple(dict.fromkeys(v for v in given if type(v) is float and 0 < v < 1e-2))


def _explains(crowd: Crowd, ran: Ran, mine: torch.Tensor) -> int | None:
    """The place of the last tensor of the run that is the experts' sum with these gates; None where there is none."""
    for rows in ran.given():
        y = (crowd.results(rows) * mine[:, None]).sum(-1)
        fitting = [place for place, theirs in enumerate(ran.wide(crowd.body.outputs)) if _same(y, theirs)]
        if fitting:
            return fitting[-1]
    return None


def _same(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Row by row, so that large rows do not hide small ones; what is not finite must be the same."""
    odd = ~mine.isfinite()
    if not torch.equal(odd, ~theirs.isfinite()) or not torch.allclose(mine[odd], theirs[odd], equal_nan=True):
        return False
    mine, theirs = mine.masked_fill(odd, 0).double(), theirs.masked_fill(odd, 0).double()
    # Fresh memory may hold anything: neither side's size alone may say how near is near.
    least = torch.minimum(mine.norm(dim=-1), theirs.norm(dim=-1))
    return bool(((mine - theirs).norm(dim=-1) <= 1e-4 * least).all())
