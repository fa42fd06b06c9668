"""MoE layers of an ONNX graph: each choice of experts, what is computed from it, and the proof of what that is.

T tokens, K experts per token, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moec.frontends.onnx.candidates import NEAR, candidates
from moec.frontends.onnx.constants import Constants
from moec.frontends.onnx.dense import ffns, prove_ffn
from moec.frontends.onnx.flow import Flow
from moec.frontends.onnx.layer import Feeds, Layer, Left, Run
from moec.frontends.onnx.moe_ops import moe_nodes, prove_node
from moec.frontends.onnx.prove import prove

Prover = Callable[[Any, Sequence[Run]], Layer | Left]
# Recorded values of all runs that are held at once, in bytes.
MOST_BYTES = 1 << 29


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
    found = Reading([], [], [dict(feed) for feed in feeds])
    left = _read(found, model, candidates(flow, constants), prove, feeds, session_of)
    nodes = moe_nodes(model.graph)
    wrong = _read(found, model, nodes, lambda one, runs: prove_node(one, constants, runs), feeds, session_of)
    parts = _parts(flow, found.layers)
    found.left += [why for one, why in left if not parts.intersection(flow.place[choice] for choice in one.choices)]
    found.left += [why for _, why in wrong]
    free = [one for one in ffns(model.graph, constants) if flow.place[one.down] not in parts]
    # Products that are no FFN are nobody's concern.
    _read(found, model, free, lambda one, runs: prove_ffn(one, constants, runs), feeds, session_of)
    return found


def _read(
    found: Reading, model: Any, subjects: Iterable[Any], prover: Prover, feeds: Feeds, session_of: Any
) -> list[tuple[Any, Left]]:
    """Add what is proved to the layers; what is not, with the reasons."""
    left = []
    for group in _groups(subjects):
        runs = record(model, _wanted(group), feeds, session_of)
        for subject in group:
            proved = prover(subject, runs)
            if isinstance(proved, Left):
                left.append((subject, proved))
                continue
            found.layers.append(proved)
            for kept, run in zip(found.runs, runs, strict=True):
                kept.update({v.name: run[v.name] for v in _kept(proved) if v.name in run})
    return left


def _kept(layer: Layer) -> list[Any]:
    """What checking the layer needs to know of the runs."""
    values = [*layer.ids, layer.scores, *(v for pair in layer.alike for v in pair), layer.x, layer.routing, layer.y]
    return [value for value in values if value is not None]


def _groups(found: Iterable[Any]) -> Iterator[list[Any]]:
    """Subjects whose values are recorded together; a value's size is guessed from what is known of it."""
    group: list[Any] = []
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


def _wanted(group: Sequence[Any]) -> list[Any]:
    return list(dict.fromkeys(v for c in group if not c.reason for v in c.values if v.name))


def _parts(flow: Flow, layers: Sequence[Layer]) -> set[int]:
    """Places of nodes that belong to a proved layer: sorting inside of it, choosing groups of experts before it."""
    found: set[int] = set()
    for layer in layers:
        if layer.form == "logits":
            node = layer.y.producer()
            found.update(i for i in flow.before(node) if i >= flow.place[node] - 2 * NEAR)
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
