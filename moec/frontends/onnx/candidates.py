"""Values near a choice of experts that may play a part in a layer, by their types, their sizes and how values flow."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from moec.frontends.onnx.banks import Found, expert_weights, shape_of
from moec.frontends.onnx.constants import Constants
from moec.frontends.onnx.flow import Flow

CHOICES = ("TopK", "ArgMax")
FLOATS = ("FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16")
# How far before the choice its input may have been computed, in nodes.
NEAR = 24
# How many nodes behind the experts' weights may give the result: a sum, a product, some reshapes.
MOST_JOINS = 12
# How many values behind a choice may be the weights, counted from either end.
MOST_WEIGHTS = 32


@dataclass
class Candidate:
    """One choice of experts, or several that one layer makes, with the values that may play a part in it."""

    choices: tuple[Any, ...]
    xs: list[Any] = field(default_factory=list)
    weights: list[Any] = field(default_factory=list)
    ys: list[Any] = field(default_factory=list)
    found: Found | None = None
    reason: str = ""

    @property
    def name(self) -> str:
        return str(self.choices[0].name or self.choices[0].outputs[-1].name)

    @property
    def ids(self) -> tuple[Any, ...]:
        return tuple(choice.outputs[-1] for choice in self.choices)

    @property
    def scores(self) -> Any:
        return self.choices[0].inputs[0]

    @property
    def values(self) -> tuple[Any, ...]:
        """All of them, to be recorded."""
        return (*self.ids, self.scores, *self.xs, *self.weights, *self.ys)


def candidates(flow: Flow, read: Constants) -> Iterator[Candidate]:
    """Each choice, and each pair of ArgMax that one layer makes."""
    choices = [n for i, n in enumerate(flow.nodes) if n.op_type in CHOICES and n.domain == "" and i in flow.after]
    taken: set[Any] = set()
    for choice in choices:
        if choice in taken:
            continue
        partner = _partner(flow, read, choice, choices)
        if partner is not None:
            taken.add(partner)
        yield candidate_of(flow, read, (choice,) if partner is None else (choice, partner))


def _partner(flow: Flow, read: Constants, choice: Any, choices: Sequence[Any]) -> Any:
    """The second of two choices that one layer makes: no weights are used between the two."""
    if choice.op_type != "ArgMax":
        return None
    behind = flow.behind(choice)
    for one in choices:
        if one is not choice and one.op_type == "ArgMax" and flow.place[one] in behind:
            between = [flow.nodes[i] for i in sorted(behind & flow.before(one))]
            return None if any(len(read.shape(v)) > 1 for v in read.of(between) if read.is_float(v)) else one
    return None


def candidate_of(flow: Flow, read: Constants, choices: tuple[Any, ...]) -> Candidate:
    """The values near a choice, or the reason why it is none of experts."""
    choice, last = choices[0], choices[-1]
    joins = flow.joins(last)
    candidate = Candidate(choices, ys=[v for node in joins for v in node.outputs if is_float(v)])
    if not candidate.ys:
        candidate.reason = "nothing that is computed from the choice comes together again"
        return candidate
    if not any(len(read.shape(v)) > 1 for v in read.of(_inside(flow, choice, joins[-1]))):
        candidate.reason = "no weights are used behind the choice"
        return candidate
    # A later layer's weights lie behind the joins as well; the nearest join that has enough of them decides.
    for index, join in enumerate(joins):
        region = flow.region(choice, join)
        if any(node.op_type in ("MoE", "QMoE") for node in region):
            candidate.reason = "what it chooses goes into an op that chooses by itself"
            return candidate
        found = expert_weights(region, read, 2)
        if len(found.matrices) in (2, 3):
            candidate.found = found
            candidate.ys = [v for node in joins[index : index + MOST_JOINS] for v in node.outputs if is_float(v)]
            _gather_values(flow, candidate, join)
            return candidate
    candidate.reason = "the weights behind the choice are not two or three matrices for each expert"
    return candidate


def _inside(flow: Flow, choice: Any, end: Any) -> list[Any]:
    return [flow.nodes[i] for i in sorted(flow.before(end) - flow.before(choice))]


def _gather_values(flow: Flow, candidate: Candidate, end: Any) -> None:
    """x from near the choice, the weights from behind it, both by their last size where it is known."""
    assert candidate.found is not None
    choice = candidate.choices[0]
    place, behind, ahead = flow.place[choice], flow.behind(choice), flow.before(choice)
    inside = flow.before(end) - ahead
    widths = {size for bank in candidate.found.matrices for size in shape_of(bank)}
    close = [i for i in sorted(ahead) if place - NEAR <= i < place]
    outside = sorted(inside - behind)
    xs = [v for i in (*reversed(close), *outside) for v in flow.nodes[i].outputs]
    candidate.xs = [v for v in (*xs, *flow.inputs) if is_float(v) and _may_end(v, widths)]
    candidate.ys = [v for v in candidate.ys if _may_end(v, widths)]
    experts = len(candidate.found.matrices[0])
    slots = [v for i in sorted(behind & inside) for v in flow.nodes[i].outputs if is_float(v)]
    slots = [v for v in slots if _may_weigh(v.shape, experts, widths)]
    firsts = [v for one in candidate.choices if one.op_type == "TopK" for v in one.outputs[:-1] if is_float(v)]
    # Routers come first, and what is told to the experts last.
    candidate.weights = list(dict.fromkeys([*firsts, *slots[:MOST_WEIGHTS], *slots[-MOST_WEIGHTS:]]))


def is_float(value: Any) -> bool:
    """Whether a value may be a tensor of floating point; graphs with ops that ONNX does not know lack types."""
    if isinstance(value.type, ir.SequenceType | ir.OptionalType):
        return False
    return bool(value.name) and (value.dtype is None or value.dtype.name in FLOATS)


def _may_end(value: Any, widths: Iterable[int]) -> bool:
    """Whether the last size may be one of these."""
    shape = value.shape
    return shape is None or not len(shape) or not isinstance(shape[-1], int) or shape[-1] in widths


def _may_weigh(shape: Any, experts: int, widths: Container[int]) -> bool:
    """Whether there may be a weight for each slot, expert or place; sizes that are not known may be anything."""
    sizes = [size if isinstance(size, int) else 0 for size in shape or ()]
    if sizes and sizes[-1] in widths and sizes[-1] != experts and sizes[-2:-1] != [experts]:
        return False
    return math.prod(size or 1 for size in sizes) <= experts**2 or (len(sizes) > 2 and sizes[-2] == experts)
