"""A part of a graph of fixed sizes as one for any number of tokens: a guess, to be judged by value at the sizes it had.

T tokens, the product of x's leading sizes; D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from moec.frontends.fx.memory import name_of
from moec.frontends.fx.outline import Outlined, product_of

_OF_SHAPE = ("view", "reshape", "_unsafe_view", "expand", "new_zeros", "new_ones", "new_full", "new_empty")
_MAKING = ("zeros", "ones", "full", "empty")


def widened(outlined: Outlined, shape: Sequence[int]) -> Outlined | None:
    """The part with numbers that may stand for x's leading sizes or multiples of T computed from x; None without such.

    `shape` is x's. A number that is a width and happens to be a multiple of T is taken for one, too: such a part will
    not run at other sizes.
    """
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(outlined.module.graph, copies))
    sizes = _Sizes(graph, next(iter(graph.find_nodes(op="placeholder"))), tuple(shape[:-1]))
    for node in list(graph.nodes):
        if node.op in ("call_function", "call_method"):
            node.args = _freed(node, sizes)
    if not sizes.used:
        return None
    graph.lint()
    return replace(outlined, module=fx.GraphModule(outlined.module, graph).eval())


class _Sizes:
    """Nodes for sizes of x, made in front of everything that may read them."""

    def __init__(self, graph: fx.Graph, x: fx.Node, lead: tuple[int, ...]) -> None:
        self.graph, self.x, self.lead, self.tokens = graph, x, lead, math.prod(lead)
        self.first, self.used = x.next, False

    def of(self, axes: Sequence[int], factor: int = 1) -> fx.Node:
        self.used = True
        with self.graph.inserting_before(self.first):
            return product_of(self.graph, self.x, axes, factor)

    def count(self, number: Any) -> Any:
        """A multiple of T as one; anything else as it is."""
        if type(number) is not int or number < self.tokens or number % self.tokens:
            return number
        return self.of(range(len(self.lead)), number // self.tokens)

    def shape(self, given: Sequence[Any]) -> list[Any]:
        """A shape that begins with x's leading sizes, or with a multiple of T."""
        if tuple(given[: len(self.lead)]) == self.lead:
            return [*(self.of([axis]) for axis in range(len(self.lead))), *given[len(self.lead) :]]
        return [self.count(given[0]), *given[1:]] if given else []


def _freed(node: fx.Node, sizes: _Sizes) -> tuple[Any, ...]:
    """The node's arguments with sizes of x where those are sizes."""
    name, args = name_of(node), node.args
    if name == "arange":
        at = 0 if len(args) == 1 else 1
        return (*args[:at], sizes.count(args[at]), *args[at + 1 :]) if len(args) > at else args
    at = 1 if name in _OF_SHAPE else 0
    if name not in (*_OF_SHAPE, *_MAKING) or len(args) <= at:
        return args
    if isinstance(args[at], list | tuple | torch.Size):
        return (*args[:at], sizes.shape(list(args[at])), *args[at + 1 :])  # type: ignore[arg-type]
    return (*args[:at], *sizes.shape(args[at:])) if node.op == "call_method" else args
