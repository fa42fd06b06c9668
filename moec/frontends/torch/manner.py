"""A reading of what a router with a capacity does, as ops of the IR, and what it drops.

T tokens, S positions, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from moec.backendbase import load_backend
from moec.frontends.torch.capacitysize import Capacity
from moec.frontends.torch.crowdlogits import noise
from moec.ir import Builder, Dim, Group, KeptWeights, Route, Tensor, Value
from moec.weights import WeightStore


@dataclass(frozen=True)
class Manner:
    """How logits become kept slots and their weights: the attributes of `route`, `group` and `kept_weights`."""

    k: int
    score: str
    normalize: str = "none"
    kept: str = "none"
    eps: float = 0.0
    policy: str = "arrival"
    priority: str = "token"
    scope: str = "batch"

    def add(self, b: Builder, logits: Value, experts: int, capacity: Capacity) -> tuple[Value, ...]:
        """The ops: weights and experts [T, K], order and offsets of what is kept. Raises nothing for valid readings."""
        eps = self.eps if self.normalize != "none" else 0.0
        chosen = Route(logits, k=self.k, score=self.score, normalize=self.normalize, eps=eps)
        weights, ids = b.add_many(chosen, ("chosen_weights" if self.kept != "none" else "weights", "experts"))
        sequence = None
        if self.scope == "sequence":
            b.input("sequence", Tensor.of("bool", "S"))
            sequence = Dim.of("S")
        grouped = Group(
            ids,
            weights if self.policy != "arrival" else None,
            experts=experts,
            capacity=capacity.size("T" if sequence is None else "S"),
            policy=self.policy,
            priority=self.priority,
            scope=self.scope,
            sequence=sequence,
        )
        order, offsets = b.add_many(grouped, ("order", "offsets"))
        if self.kept != "none":
            weights = b.add(KeptWeights(weights, order, normalize=self.kept, eps=self.eps), name="weights")
        return weights, ids, order, offsets


@dataclass(frozen=True)
class Limits:
    """A proved reading, and on what it was tried."""

    manner: Manner
    capacity: Capacity
    tried: int
    ties: bool = True
    """Whether ties between a token's experts are broken as `route` breaks them."""


def dropped(found: Limits, experts: int, tokens: int) -> float:
    """The share of slots that is dropped of one sequence of tokens whose choices are random."""
    manner = replace(found.manner, normalize="none", kept="none", eps=0.0)
    logits = noise(1, tokens, experts, seed=11)
    b = Builder("drops")
    given = b.input("logits", Tensor.of("f32", "T", experts))
    region = b.build(*manner.add(b, given, experts, found.capacity))
    built = load_backend("reference").build(region, WeightStore(torch.nn.Module(), {}), {})
    more = (torch.ones(tokens, dtype=torch.bool),) if manner.scope == "sequence" else ()
    order = built(logits[0], *more)[2]
    return int((order < 0).sum()) / order.numel()
