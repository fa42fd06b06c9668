"""What goes into the graphs that nodes run: If's branches once, the bodies of Loop and Scan turn by turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from moec.frontends.onnx.bodies import Body

Feed = dict[str, Any]
Turn = tuple[str, Feed, list[Any]]
"""In words, inputs, and what the graph as it is makes of them."""
Call = Callable[[Feed], list[Any]]
# The first turns tell a layer; the others go on from what they give.
MOST_TURNS = 3


def given(body: Body) -> list[Any]:
    """Values of the graph around a body that tell what goes into it."""
    return [*body.read, *(value for value in body.node.inputs if value is not None)]


def turns(body: Body, run: Mapping[str, Any], call: Call) -> Iterator[Turn]:
    """What the body gets in one run of the graph around it. `run` has the values of `given` that are no constants.

    Raises what running the body raises.
    """
    fixed = {value.name: run[value.name] for value in body.read}
    inputs = [None if value is None else _held(value, run) for value in body.node.inputs]
    return {"If": _branch, "Loop": _loop, "Scan": _scan}[body.node.op_type](body, fixed, inputs, call)


def _held(value: Any, run: Mapping[str, Any]) -> Any:
    return run[value.name] if value.const_value is None else value.const_value.numpy()


def _branch(body: Body, fixed: Feed, inputs: Sequence[Any], call: Call) -> Iterator[Turn]:
    """Either branch, whichever is taken: it is read and checked by what it would get."""
    taken = "then_branch" if bool(np.asarray(inputs[0]).reshape(-1)[0]) else "else_branch"
    yield ("taken" if taken == body.attribute else "not taken"), fixed, call(fixed)


def _loop(body: Body, fixed: Feed, inputs: Sequence[Any], call: Call) -> Iterator[Turn]:
    """The number of the turn, whether to go on, states -> whether to go on, states, slices."""
    most = None if inputs[0] is None else int(np.asarray(inputs[0]).reshape(-1)[0])
    further = inputs[1] if len(inputs) > 1 and inputs[1] is not None else np.array(True)
    states = list(inputs[2:])
    for turn in range(MOST_TURNS if most is None else min(most, MOST_TURNS)):
        if not bool(np.asarray(further).reshape(-1)[0]):
            return
        number, go_on = body.own[:2]
        feed = {number.name: _like(number, np.array(turn, np.int64)), go_on.name: _like(go_on, np.asarray(further))}
        feed |= {value.name: state for value, state in zip(body.own[2:], states, strict=True)} | fixed
        found = call(feed)
        yield f"turn {turn}", feed, found
        further, states = found[0], found[1 : 1 + len(states)]


def _like(value: Any, scalar: Any) -> Any:
    """A scalar with the rank that the body states: 0, or 1 of one element."""
    return scalar.reshape([1] * len(value.shape)) if value.shape is not None else scalar.reshape(())


def _scan(body: Body, fixed: Feed, inputs: Sequence[Any], call: Call) -> Iterator[Turn]:
    """States and slices -> states and slices."""
    attributes = body.node.attributes
    slices = attributes["num_scan_inputs"].as_int()
    count = len(inputs) - slices
    states, sequences = list(inputs[:count]), list(inputs[count:])
    axes, backward = (
        list(attributes[name].as_ints()) if name in attributes else [0] * slices
        for name in ("scan_input_axes", "scan_input_directions")
    )
    length = sequences[0].shape[axes[0]]
    for turn in range(min(length, MOST_TURNS)):
        places = [length - 1 - turn if back else turn for back in backward]
        rows = [np.take(one, at, axis) for one, at, axis in zip(sequences, places, axes, strict=True)]
        feed = {value.name: array for value, array in zip(body.own, [*states, *rows], strict=True)} | fixed
        found = call(feed)
        yield f"turn {turn}", feed, found
        states = found[:count]
