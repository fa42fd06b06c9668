"""The layers of one graph of an ONNX file, and of the graphs that its nodes run, rewritten and checked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moec.exporter.beside import Compared, Made, beside, runner
from moec.exporter.place_layer import path_of, place_layer
from moec.exporter.result import ExportedLayer, ExportReport
from moec.exporter.settings import Settings
from moec.frontends.onnx.bodies import Body, bodies, left_within, name_types, put_back
from moec.frontends.onnx.constants import Constants
from moec.frontends.onnx.graphs import forget_unused, hold_once
from moec.frontends.onnx.home import Home
from moec.frontends.onnx.layer import Layer, Left, Run
from moec.frontends.onnx.read import read, record
from moec.frontends.onnx.turns import given, turns

Say = Callable[[str], None]
Open = Callable[[Any], Any]
"""A session of a model."""


@dataclass
class GraphRewriter:
    """What rewriting all graphs of one file has in common."""

    settings: Settings
    report: ExportReport
    say: Say
    open: Open
    home: Home | None = None
    timed: bool = False
    compared: list[Compared] = field(default_factory=list)
    """Of each graph that was rewritten."""
    _names: set[str] = field(default_factory=set)
    _held: set[str] = field(default_factory=set)
    """Of values that the file came with."""
    _weights: set[bytes] = field(default_factory=set)
    """The first matrix of each rewritten layer."""
    _shared: bool = False
    """Whether two of them have the same weights."""

    def rewrite(self, model: Any, made: Sequence[Made], title: str, within: str = "", note: str = "") -> int:
        """How many layers were rewritten, in this graph and in those that its nodes run.

        Raises MOEC704 where the graph differs then, or a layer cannot be written.
        """
        self._held.update(_value_names(model.graph))
        found = read(model, [one.feed for one in made], self.open)
        self.report.layers += [_left(one, within) for one in found.left]
        chosen: dict[Any, None] = {}
        count = 0
        for layer in found.layers:
            evidence = (*layer.evidence, *([f"within {within}{note}"] if within else []))
            named = replace(layer, name=self._name(layer), evidence=evidence)
            self.say(f"{named.name}: checking")
            if place_layer(model, named, found.runs[0], self.settings, self.report, timed=self.timed):
                count += 1
                self._note(named)
                self._keep(model)
                chosen.update(dict.fromkeys(named.ids))
        # Bodies that belonged to a layer are gone before bodies are looked at.
        forget_unused(model, list(chosen))
        count += self._bodies(model, made)
        if count:
            if self._shared and not within:
                hold_once(model)
                self._keep(model)
            self.say(f"checking {title}")
            names = [value.name for value in chosen]
            self.compared.append(beside(model, names, made, found.runs, self.settings, title))
            forget_unused(model)
        return count

    def _name(self, layer: Layer) -> str:
        """A name that no other layer has: one module may stand in both branches, and moec may have written the file."""
        wish = name = path_of(layer)
        number, held = 2, self._held - {layer.y.name}
        while name in self._names or any(one.startswith(f"{name}/") for one in held):
            name, number = f"{wish}_{number}", number + 1
        self._names.add(name)
        return name

    def _note(self, layer: Layer) -> None:
        """One module may be called twice, and one function too."""
        first = layer.weights.experts("w_in")[0].float().contiguous().numpy().tobytes()
        told = hashlib.sha256(first).digest()
        self._shared = self._shared or told in self._weights
        self._weights.add(told)

    def _keep(self, model: Any) -> None:
        if self.home is not None:
            self.home.keep(model.graph.initializers.values())
            self.home.rest(model)

    def _bodies(self, model: Any, made: Sequence[Made]) -> int:
        """The graphs that nodes of this one run."""
        found = []
        for one in bodies(model, Constants(model, self.open)):
            if isinstance(one, Left):
                self.report.layers.append(_left(one))
            else:
                found.append(one)
        if not found:
            return 0
        wanted = list(dict.fromkeys(value for body in found for value in given(body)))
        try:
            runs = record(model, wanted, [one.feed for one in made], self.open)
        except Exception as error:  # ONNX Runtime's errors have no common class
            for body in found:
                self._leave(body, f"what it reads cannot be recorded: {_line(error)}")
            return 0
        labels = [one.label for one in made]
        return sum(self._body(model, body, runs, labels) for body in found)

    def _leave(self, body: Body, why: str) -> None:
        self.report.layers += [_left(one, body.name) for one in left_within(body.model.graph, why)]

    def _body(self, model: Any, body: Body, runs: Sequence[Run], labels: Sequence[str]) -> int:
        """One of them: run alone on what it gets in each run, rewritten, and put back."""
        made: list[Made] = []
        why = "no run of the file goes through it"
        try:
            made = self._made(body, runs, labels)
        except Exception as error:  # ONNX Runtime's errors have no common class
            why = f"it does not run alone: {_line(error)}"
        if not made:
            self._leave(body, why)
            return 0
        note = ""
        if body.node.op_type == "If" and not any(one.label.endswith("; taken") for one in made):
            note = ", which no run takes: it was run on what it reads"
        count = self.rewrite(body.model, made, body.name, body.name, note)
        if count:
            put_back(body, model)
        return count

    def _made(self, body: Body, runs: Sequence[Run], labels: Sequence[str]) -> list[Made]:
        """What it gets and gives in each run. Raises what running it raises."""
        name_types([value for value in body.model.graph.inputs if value in body.around], runs[0])
        runtime = self.open(body.model)
        return [
            Made(f"{label}; {turn}", feed, outputs)
            for label, run in zip(labels, runs, strict=True)
            for turn, feed, outputs in turns(body, run, lambda feed: runner(runtime, feed)())
        ]


def _value_names(graph: Any) -> Iterator[str]:
    """Of all that it and the graphs that its nodes run hold."""
    for one in (*graph.inputs, *graph.initializers.values(), *(v for node in graph.all_nodes() for v in node.outputs)):
        if one.name:
            yield one.name


def _left(one: Left, within: str = "") -> ExportedLayer:
    return ExportedLayer(
        one.name, one.kind, "left alone", reason=f"within {within}: {one.reason}" if within else one.reason
    )


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
