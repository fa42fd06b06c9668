"""MoE layers of an ONNX graph: each choice of experts, what is computed from it, and the proof of what that is.

T tokens, K experts per token, D model width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moec.frontends.onnx.candidates import NEAR, Candidate, candidates
from moec.frontends.onnx.constants import Constants
from moec.frontends.onnx.flow import Flow
from moec.frontends.onnx.layer import Feeds, Layer, Left, Run
from moec.frontends.onnx.prove import prove

# Recorded values of all runs that are held at once, in bytes.
MOST_BYTES = 1 << 28


@dataclass
class Reading:
    """The layers of a graph, the candidates that are none, and what checking the layers needs to know of each run."""

    layers: list[Layer]
    left: list[Left]
    runs: list[dict[str, Any]]


def read(model: Any, feeds: Feeds, session_of: Any) -> Reading:
    """The layers of a graph. `feeds` are inputs to run it on, the one to solve first; `session_of(model)` runs it."""
    constants = Constants(model, session_of)
    flow = Flow(model.graph, constants)
    layers: list[Layer] = []
    left: list[tuple[Candidate, Left]] = []
    runs = [dict(feed) for feed in feeds]
    for group in _groups(candidates(flow, constants)):
        found = record(model, _wanted(group), feeds, session_of)
        for candidate in group:
            proved = prove(candidate, found)
            if isinstance(proved, Left):
                left.append((candidate, proved))
            else:
                layers.append(proved)
                for kept, run in zip(runs, found, strict=True):
                    kept.update({v.name: run[v.name] for v in _kept(proved) if v.name in run})
    parts = _parts(flow, layers)
    reasons = [one for c, one in left if not parts.intersection(flow.place[choice] for choice in c.choices)]
    return Reading(layers, reasons, runs)


def _kept(layer: Layer) -> list[Any]:
    """What checking the layer needs to know of the runs."""
    values = [*layer.ids, layer.scores, *(v for pair in layer.alike for v in pair), layer.x, layer.routing, layer.y]
    return [value for value in values if value is not None]


def _groups(found: Iterable[Candidate]) -> Iterator[list[Candidate]]:
    """Candidates whose values are recorded together; a value's size is guessed from what is known of it."""
    group: list[Candidate] = []
    total = 0
    for candidate in found:
        size = 0 if candidate.reason else sum(map(_guess, candidate.values))
        if group and total + size > MOST_BYTES:
            yield group
            group, total = [], 0
        group.append(candidate)
        total += size
    if group:
        yield group


def _guess(value: Any) -> int:
    """Bytes in all runs."""
    total = 400
    for size in value.shape or ():
        total *= size if isinstance(size, int) else 1
    return total


def _wanted(group: Sequence[Candidate]) -> list[Any]:
    return list(dict.fromkeys(v for c in group if not c.reason for v in c.values if v.name))


def _parts(flow: Flow, layers: Sequence[Layer]) -> set[int]:
    """Places of nodes that belong to a proved layer: sorting inside of it, choosing groups of experts before it."""
    found: set[int] = set()
    for layer in layers:
        for choice in (value.producer() for value in layer.ids):
            found.update(flow.before(layer.y.producer()) - flow.before(choice))
            found.update(i for i in flow.before(choice) if i >= flow.place[choice] - NEAR)
    return found


def record(model: Any, values: Sequence[Any], feeds: Feeds, session_of: Any) -> list[Run]:
    """The values in each run of the graph."""
    outputs = model.graph.outputs
    count = len(outputs)
    given = {*model.graph.inputs, *outputs}
    outputs.extend(value for value in values if value not in given and value.const_value is None)
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
