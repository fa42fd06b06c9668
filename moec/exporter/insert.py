"""Lowered regions in the places of their marks, in an onnx-ir graph. T tokens, K experts per token."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moec.backends.onnx.emitter import Emitter
from moec.backends.onnx.lower import lower
from moec.exporter.facts import Facts, facts_of
from moec.exporter.marks import DOMAIN
from moec.exporter.placed import Placed
from moec.exporter.probes import num_experts
from moec.exporter.routers import router_of
from moec.ir import Region


@dataclass(frozen=True)
class Inserted:
    """A region in the graph: the values it reads and the one it gives."""

    key: str
    inputs: tuple[Any, ...]
    output: Any


def insert(model: Any, placed: Mapping[str, Placed]) -> list[Inserted]:
    """Replace each mark by the nodes of its region, in place."""
    graph = model.graph
    found = []
    for node in [node for node in graph if node.domain == DOMAIN]:
        key = node.attributes["layer"].as_string()
        facts, router = Facts(), None
        if len(node.inputs) == 3:
            region, (_, ids, weights) = placed[key].region, node.inputs
            facts = facts_of(ids, weights, num_experts(region))
            router = router_of(ids, weights, num_experts(region), region.inputs[0].type.dtype)
        one = placed[key].settled(facts, router)
        emit = Emitter(one.name or "model")
        given = one.inputs(emit, list(node.inputs))
        (output,) = lower(one.region, one.weights, emit, given, form=one.form, **known(one.region, facts))
        _describe(emit, one)
        put_before(graph, node, emit)
        output.shape, output.type = node.outputs[0].shape, node.outputs[0].type
        inputs = tuple(node.inputs)
        node.outputs[0].replace_all_uses_with(output, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        found.append(Inserted(key, inputs, output))
    model.opset_imports.pop(DOMAIN, None)
    return found


def known(region: Region, facts: Facts) -> dict[str, list[str]]:
    """What `lower` may take for granted about the region's inputs: x, experts and weights, if it reads these."""
    names = [value.name for value in region.inputs] if len(region.inputs) == 3 else []
    return {
        "chosen": names[1:2] if facts.chosen else [],
        # What a token gives to a number that is no expert is missing from the sum of its experts' weights.
        "sums_to_one": names[2:3] if facts.sums_to_one and facts.chosen else [],
    }


def put_before(graph: Any, node: Any, emit: Emitter) -> None:
    """The emitted nodes and initializers into a graph, before a node."""
    for value in emit.initializers:
        graph.register_initializer(value)
    graph.insert_before(node, emit.nodes)
    for domain, version in emit.domains.items():
        graph.opset_imports.setdefault(domain, version)


def _describe(emit: Emitter, one: Placed) -> None:
    """The last node says what the ones before it are; the first may turn out to be unused."""
    if emit.nodes:
        emit.nodes[-1].doc_string = f"moec: {one.name}\n{one.region}"


def name_sizes(model: Any, names: Sequence[str] = ("batch", "sequence")) -> None:
    """Give dynamic sizes the names people expect, wherever they stand: torch calls them s95."""
    wished: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, size in enumerate(value.shape or ()):
            text = getattr(size, "value", None)
            if isinstance(text, str) and re.fullmatch(r"s\d+", text) and text not in wished:
                plain = names[axis] if axis < len(names) else f"{value.name}_{axis}"
                wished[text] = plain if plain not in wished.values() else f"{value.name}_{axis}"
    pattern = re.compile(r"\b(" + "|".join(wished or ("never",)) + r")\b")
    values = [*model.graph.inputs, *(output for node in model.graph.all_nodes() for output in node.outputs)]
    for value in values:
        for axis, size in enumerate(value.shape or ()):
            text = getattr(size, "value", None)
            if isinstance(text, str) and text.isdecimal():  # torch writes sizes that the model fixed as names
                value.shape[axis] = int(text)
            elif isinstance(text, str) and pattern.search(text):
                value.shape[axis] = pattern.sub(lambda found: wished[found[1]], text)
