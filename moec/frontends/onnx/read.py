"""MoE layers of an ONNX graph: each choice of experts, what is computed from it, and the proof of what that is.

T tokens, K experts per token, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moec.frontends.onnx.banks import Found, expert_weights
from moec.frontends.onnx.flow import Flow, constants
from moec.frontends.onnx.solve import Recorded, Solution, activated, lift, near, project, solve
from moec.frontends.onnx.store import FileWeights
from moec.ir import Region

Feeds = Sequence[Mapping[str, Any]]
CHOICES = ("TopK", "ArgMax")
FLOATS = ("FLOAT",)
# How far before the choice its input may have been computed, in nodes.
NEAR = 24


@dataclass(frozen=True)
class Layer:
    """A proved layer: the values of the graph that it reads, the one it gives, and its region."""

    name: str
    region: Region
    weights: FileWeights
    x: Any
    routing: Any
    ids: Any
    y: Any
    evidence: tuple[str, ...]
    alike: tuple[tuple[Any, Any], ...] = ()
    """x and routing, and pairs of values that were equal to them in every run: y may be computed from any of these."""


@dataclass(frozen=True)
class Left:
    """A choice that is left alone, and why."""

    name: str
    reason: str


@dataclass
class Candidate:
    """One choice of experts with the values that may play a part in it."""

    choice: Any
    ids: Any
    xs: list[Any]
    weights: list[Any]
    ys: list[Any]
    found: Found | None = None
    reason: str = ""


def read(model: Any, feeds: Feeds, session_of: Any) -> tuple[list[Layer], list[Left]]:
    """The layers of a graph. `feeds` are inputs to run it on, the one to solve first; `session_of(model)` runs it."""
    flow = Flow(model.graph)
    choices = [node for node in model.graph if node.op_type in CHOICES and node.domain == ""]
    candidates = [candidate_of(flow, node) for node in choices if flow.place[node] in flow.after]
    wanted = {v for c in candidates if not c.reason for v in (c.ids, *c.xs, *c.weights, *c.ys)}
    runs = record(model, [v for v in wanted if v.name], feeds, session_of)
    made = [(candidate, prove(candidate, runs)) for candidate in candidates]
    layers = [one for _, one in made if isinstance(one, Layer)]
    parts = _parts(flow, layers)
    return layers, [one for c, one in made if isinstance(one, Left) and flow.place[c.choice] not in parts]


def _parts(flow: Flow, layers: Sequence[Layer]) -> set[int]:
    """Places of nodes that belong to a proved layer: sorting inside of it, choosing groups of experts before it."""
    found: set[int] = set()
    for layer in layers:
        choice = layer.ids.producer()
        found.update(flow.before(layer.y.producer()) - flow.before(choice))
        found.update(i for i in flow.before(choice) if i >= flow.place[choice] - NEAR)
    return found


def candidate_of(flow: Flow, choice: Any) -> Candidate:
    """The values near a choice, by their types and by how values flow."""
    ids = choice.outputs[-1]
    joins = flow.joins(choice)
    place = flow.place[choice]
    behind, ahead = flow.behind(choice), flow.before(choice)
    ys = [v for node in joins for v in node.outputs if _float(v)]
    candidate = Candidate(choice, ids, [], [], ys)
    if not ys:
        candidate.reason = "nothing that is computed from the choice comes together again"
        return candidate
    inside = flow.before(joins[-1]) - ahead
    initializers = constants(flow.nodes[i] for i in sorted(inside))
    close = [i for i in sorted(ahead) if place - NEAR <= i < place]
    outside = sorted(inside - behind)
    candidate.xs = [v for i in (*reversed(close), *outside) for v in flow.nodes[i].outputs if _float(v)]
    candidate.xs += [v for v in flow.inputs if _float(v)]
    candidate.weights = [v for i in sorted(behind & inside) for v in flow.nodes[i].outputs if _float(v)]
    candidate.weights = [*(v for v in choice.outputs[:-1] if _float(v)), *candidate.weights[:40]]
    if not any(len(v.const_value.shape) > 1 for v in initializers):
        candidate.reason = "no weights are used behind the choice"
        return candidate
    # A later layer's weights lie behind the joins as well; the nearest join that has enough of them decides.
    for join in joins:
        nodes = flow.region(choice, join)
        found = expert_weights(nodes, constants(nodes), 2)
        if len(found.matrices) in (2, 3):
            candidate.found = found
            return candidate
    candidate.reason = "the weights behind the choice are not two or three matrices for each expert"
    return candidate


def _float(value: Any) -> bool:
    return value.dtype is not None and value.dtype.name in FLOATS and bool(value.name)


def record(model: Any, values: Sequence[Any], feeds: Feeds, session_of: Any) -> list[dict[str, np.ndarray[Any, Any]]]:
    """The values in each run of the graph."""
    outputs = model.graph.outputs
    count = len(outputs)
    given = set(model.graph.inputs)
    outputs.extend(value for value in values if value not in outputs and value not in given)
    names = [value.name for value in outputs]
    try:
        session = session_of(model)
    finally:
        del outputs[count:]
    known = {one.name for one in session.get_inputs()}
    return [
        {**feed, **dict(zip(names, session.run(None, {k: v for k, v in feed.items() if k in known}), strict=True))}
        for feed in feeds
    ]


def prove(candidate: Candidate, runs: Sequence[Mapping[str, Any]]) -> Layer | Left:
    """The layer that a candidate is: solved on the first run, confirmed on all others."""
    name = str(candidate.choice.name or candidate.ids.name)
    if candidate.reason or candidate.found is None:
        return Left(name, candidate.reason or "no weights of experts were found")
    recorded = [recorded_of(candidate, run) for run in runs]
    solution = solve(recorded[0], candidate.found)
    if solution is None:
        return Left(name, "no reading of its weights and activations gives the recorded values")
    for one in recorded[1:]:
        if not _holds(solution, one):
            return Left(name, "what fits one run does not fit another")
    ids = torch.cat([one.ids.flatten() for one in recorded])
    experts = len(solution.body.w_in)
    if int(ids.max()) >= experts or int(ids.min()) < 0:
        return Left(name, f"it chooses numbers outside its {experts} experts")
    region, weights = lift(_path(solution, name), solution, recorded[0].ids.shape[1])
    values = {v.name: v for v in (*candidate.xs, *candidate.weights, *candidate.ys)}
    at = solution.activation
    evidence = (
        f"{experts} experts, {recorded[0].ids.shape[1]} of them for each token, chosen by {candidate.choice.op_type}",
        f"{at.fn}, {at.layout}" + (f", clamped at {at.limit:g}" if at.limit else ""),
        f"proved by value on {len(runs)} runs, {sum(one.ids.shape[0] for one in recorded)} tokens",
    )
    xs = _alike(solution.x, [one.xs for one in recorded])
    routings = [None] if solution.weights is None else _alike(solution.weights, [one.weights for one in recorded])
    pairs = tuple((values[x], None if w is None else values[w]) for x in xs for w in routings)
    return Layer(region.name, region, weights, *pairs[0], candidate.ids, values[solution.y], evidence, pairs)


def _alike(name: str, runs: Sequence[Mapping[str, torch.Tensor]]) -> list[str]:
    """This value and those that were equal to it in every run."""
    return [name, *(other for other in runs[0] if other != name and _equal(name, other, runs))]


def _equal(name: str, other: str, runs: Sequence[Mapping[str, torch.Tensor]]) -> bool:
    return all(other in run and torch.equal(run[name], run[other]) for run in runs)


def _path(solution: Solution, name: str) -> str:
    return f"experts.{name}"


def recorded_of(candidate: Candidate, run: Mapping[str, Any]) -> Recorded:
    """The candidates' values in one run, those whose sizes fit."""
    ids = torch.from_numpy(np.ascontiguousarray(run[candidate.ids.name]))
    k = ids.shape[-1] if candidate.choice.op_type == "TopK" else 1
    ids = ids.reshape(-1, k)
    tokens = ids.shape[0]

    def chosen(values: Sequence[Any], width: int | None) -> dict[str, torch.Tensor]:
        found = {}
        for value in values:
            array = run.get(value.name)
            if array is not None and array.size and array.size % tokens == 0:
                last = array.size // tokens
                fits = last == width if width is not None else last == array.shape[-1] and last != k
                if fits:
                    found[value.name] = torch.from_numpy(np.ascontiguousarray(array)).reshape(tokens, last).float()
        return found

    xs = chosen(candidate.xs, None)
    return Recorded(ids, xs, chosen(candidate.weights, k), _wide(candidate.ys, run, tokens))


def _wide(values: Sequence[Any], run: Mapping[str, Any], tokens: int) -> dict[str, torch.Tensor]:
    """Candidates for y: [T, anything]."""
    found = {}
    for value in values:
        array = run.get(value.name)
        if array is not None and array.size and array.size % tokens == 0:
            found[value.name] = torch.from_numpy(np.ascontiguousarray(array)).reshape(tokens, -1).float()
    return found


def _holds(solution: Solution, one: Recorded) -> bool:
    body, at = solution.body, solution.activation
    if solution.x not in one.xs or solution.y not in one.ys:
        return False
    h = project(one.xs[solution.x], one.ids, body.w_in, body.b_in)
    up = None if body.w_up is None else project(one.xs[solution.x], one.ids, body.w_up, body.b_up)
    rows = project(activated(h, up, at), one.ids, body.w_out, body.b_out)
    weights = torch.ones(one.ids.shape) if solution.weights is None else one.weights.get(solution.weights)
    return weights is not None and near((rows * weights.unsqueeze(-1)).sum(1), one.ys[solution.y])
