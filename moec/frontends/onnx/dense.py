"""Dense FFNs of an ONNX graph: a product whose rows come, by elementwise steps, from one or two products of one value.

T tokens, D model width, F hidden width, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moec.frontends.onnx.banks import Found, limits_of
from moec.frontends.onnx.candidates import is_float
from moec.frontends.onnx.constants import Constants
from moec.frontends.onnx.layer import Layer, Left, Run, element
from moec.frontends.onnx.prove import fits, tensor
from moec.frontends.onnx.solve import Recorded, in_words, lift, loose, solve

PRODUCTS = ("MatMul", "Gemm")
STEPS = {
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Neg",
    "Pow",
    "Sqrt",
    "Sigmoid",
    "Tanh",
    "Erf",
    "Relu",
    "Gelu",
    "Clip",
    "Min",
    "Max",
}
STEPS |= {
    "Cast",
    "Split",
    "Slice",
    "Identity",
    "HardSigmoid",
    "HardSwish",
    "Swish",
    "QuickGelu",
    "FastGelu",
    "BiasGelu",
}
# More steps than this are no activation.
MOST_STEPS = 24
KEPT = "a dense FFN stays as it is written, unless it is quantized"


@dataclass(frozen=True)
class Ffn:
    """Two or three products, x in front of them, and what may be the result."""

    down: Any
    ups: tuple[Any, ...]
    steps: tuple[Any, ...]
    behind: tuple[Any, ...]
    """Nodes that add to the last product."""
    reason: str = ""

    @property
    def name(self) -> str:
        return str(self.down.name or self.down.outputs[0].name)

    @property
    def x(self) -> Any:
        return self.ups[0].inputs[0]

    @property
    def ys(self) -> tuple[Any, ...]:
        return tuple(node.outputs[0] for node in (self.down, *self.behind))

    @property
    def values(self) -> tuple[Any, ...]:
        return (self.x, *self.ys)


def ffns(graph: Any, read: Constants) -> Iterator[Ffn]:
    """Every such group of products, in the order of the graph."""
    for node in graph:
        if _is_product(node, read) and is_float(node.outputs[0]):
            found = _in_front(node, read)
            if found is not None:
                ups, steps = found
                yield Ffn(node, ups, steps, tuple(_biases_behind(node, read)))


def _is_product(node: Any, read: Constants) -> bool:
    if node.op_type not in PRODUCTS or node.domain != "" or read.holds(node.inputs[0]):
        return False
    return read.holds(node.inputs[1]) and read.is_float(node.inputs[1]) and len(read.shape(node.inputs[1])) == 2


def _in_front(down: Any, read: Constants) -> tuple[tuple[Any, ...], tuple[Any, ...]] | None:
    """The products that the rows come from, in order of use, and the steps between."""
    todo, steps, ups = [down.inputs[0]], dict[Any, None](), dict[Any, None]()
    while todo:
        node = todo.pop(0).producer()
        if node is None or len(steps) > MOST_STEPS:
            return None
        if _is_product(node, read):
            ups.setdefault(node)
        elif node.op_type in STEPS:
            if node not in steps:
                steps.setdefault(node)
                todo += [value for value in node.inputs if value is not None and not read.holds(value)]
        else:
            return None
    if not steps or len(ups) not in (1, 2) or len({up.inputs[0] for up in ups}) != 1:
        return None
    return tuple(ups), tuple(steps)


def _biases_behind(down: Any, read: Constants) -> Iterator[Any]:
    """The addition of a bias, if nothing else reads the product."""
    users = [user for user, _ in down.outputs[0].uses()]
    if len(users) == 1 and users[0].op_type == "Add" and any(map(read.holds, users[0].inputs)):
        yield users[0]


def prove_ffn(one: Ffn, read: Constants, runs: Sequence[Run]) -> Layer | Left:
    """The layer that the products are, or why they are none."""
    recorded = [_recorded(one, run) for run in runs]
    if any(each is None for each in recorded):
        return Left(one.name, "not every run has tokens for it", "ffn")
    held = [each for each in recorded if each is not None]
    solution = solve(held[0], _found(one, read))
    if solution is None or not all(fits(solution, each) for each in held[1:]):
        return Left(one.name, "no reading of its weights and activations gives the recorded values", "ffn")
    region, weights = lift(f"ffn.{one.name}", solution, 0, element(runs[0], one.x))
    y = next(value for value in one.ys if value.name == solution.y)
    evidence = (in_words(solution.activation), f"proved by value on {len(runs)} runs")
    return Layer(
        name=region.name, region=region, weights=weights, x=one.x, y=y, form="dense", evidence=evidence, kept=KEPT
    )


def _found(one: Ffn, read: Constants) -> Found:
    """The weights as those of one expert."""
    products = [*one.ups, one.down]
    matrices = tuple(read.tensor(node.inputs[1]).unsqueeze(0) for node in products)
    nodes = [*one.ups, *one.steps, one.down, *one.behind]
    rest = [value for value in read.of(nodes) if read.is_float(value) and len(read.shape(value)) < 2]
    biases = tuple(read.tensor(v).unsqueeze(0) for v in rest if read.shape(v) not in ((), (1,)))
    scalars = tuple(float(read.tensor(value)) for value in rest if read.shape(value) in ((), (1,)))
    return Found(matrices, biases, scalars, limits_of(nodes, read))


def _recorded(one: Ffn, run: Run) -> Recorded | None:
    x = run[one.x.name]
    if not x.size or x.dtype.kind != "f":
        return None
    rows = tensor(x).reshape(-1, x.shape[-1]).float()
    ys = {value.name: tensor(run[value.name]).reshape(len(rows), -1).float() for value in one.ys}
    ids = torch.zeros(len(rows), 1, dtype=torch.int64)
    return Recorded(ids, {one.x.name: rows}, {}, ys, bar=loose(run[value.name] for value in one.values))
