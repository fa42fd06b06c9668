"""Closed parts of an fx.Graph: everything between one value x and one value y, around the products with some weights.

A part has x as its only input besides weights and sizes of x, so it can be run alone, on any tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch import fx

from moec.frontends.fx.memory import Memory, is_fixed

# How often x moves up to take in a value from outside, and how far behind the first meeting point y is looked for.
_MOST_MOVES, _MOST_ENDS = 12, 10
_IN, _OUT = "in", "out"


@dataclass(frozen=True)
class Product:
    """A size: a number times the sizes of some of x's axes."""

    factor: int
    axes: tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """`inside` in the graph's order, from behind `x` to `y`."""

    x: fx.Node
    y: fx.Node
    inside: tuple[fx.Node, ...]
    weights: tuple[fx.Node, ...]
    sizes: Mapping[fx.Node, Product]
    """Sizes computed outside that follow from x's own."""


class Flow:
    """How values flow through a graph; `weights` are the nodes that hold parameters and buffers."""

    def __init__(self, graph: fx.Graph, memory: Memory, weights: Collection[fx.Node]) -> None:
        self.memory = memory
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.weights = set(weights)
        self.switches = [node for node in graph.nodes if _is_switch(node)]
        self.constant = set(self.weights)
        for node in graph.nodes:  # a transposed weight is a weight, and so is what is made of numbers
            fixed = all(one in self.constant for one in node.all_input_nodes)
            if fixed and is_fixed(node) and node not in memory.writes:
                self.constant.add(node)
        self.flow = nx.DiGraph()
        self.flow.add_nodes_from((_IN, _OUT))
        for node in graph.nodes:
            if node.op == "output":
                self.flow.add_edges_from((one, _OUT) for one in node.all_input_nodes if one not in self.constant)
            elif node not in self.constant and not is_assertion(node):
                inputs = [one for one in node.all_input_nodes if one not in self.constant]
                self.flow.add_edges_from((one, node) for one in inputs or [_IN])
        for node in memory.writes:
            self._order_writes(node)
        self.above = nx.immediate_dominators(self.flow, _IN)

    def _order_writes(self, write: fx.Node) -> None:
        """What reads a value after it was written to in place depends on the write."""
        for value in self.memory.written(write):
            for user in value.users:
                if self.order[user] > self.order[write] and write in self.flow:
                    end = _OUT if user.op == "output" else user
                    if end in self.flow and end is not write:
                        self.flow.add_edge(write, end)

    def products(self, weights: Collection[fx.Node]) -> set[fx.Node]:
        """The values computed from these weights and others. A module that is called is a product with its own."""
        found = {node for node in weights if node.op == "call_module"}
        todo, seen = [node for node in weights if node not in found], set()
        while todo:
            node = todo.pop()
            for user in node.users:
                if user in self.constant and user not in seen:
                    seen.add(user)
                    todo.append(user)
                elif user not in self.constant and user.op != "output":
                    found.add(user)
        return found

    def pairs(self, uses: Mapping[str, tuple[fx.Node, torch.Tensor]]) -> Iterator[tuple[str, str]]:
        """Names of matrices [F, D] and [D, F] with F > D, one multiplied behind the other, as those of FFNs are."""
        known = {name: found for name, (node, t) in uses.items() if t.dim() == 2 and (found := self.products([node]))}
        first = {name: min(self.order[node] for node in found) for name, found in known.items()}
        shape = {name: tuple(uses[name][1].shape) for name in known}
        taken: set[str] = set()
        for down in sorted(known, key=first.__getitem__):
            narrow, wide = sorted(shape[down])
            before = [
                n for n in known if first[n] < first[down] and sorted(shape[n]) in ([narrow, wide], [narrow, 2 * wide])
            ]
            if not before or wide <= narrow:
                continue
            up = max(before, key=first.__getitem__)
            if up not in taken and shape[up] != shape[down]:
                taken |= {up, down}
                yield up, down

    def parts(self, weights: Collection[fx.Node]) -> Iterator[Part | str]:
        """Closed parts around these weights, smallest first; or why there is none."""
        core = self.products(weights)
        if not core:
            yield "its weights are not used"
            return
        x = self._common({p for node in core for p in self._inputs(node)})
        for _ in range(_MOST_MOVES):
            if x == _IN:
                yield "no single value leads to its experts"
                return
            moved = None
            for y in self._ends(x, core):
                inside = self._between(x, y)
                if self._leaks(inside, y, core) or self._switches(inside):
                    continue
                outside = {p for node in inside for p in self._inputs(node)} - inside - {x}
                sizes = {node: found for node in outside if (found := size_of(x, node))}
                rest, beside = outside - sizes.keys(), self._beside(x, outside - sizes.keys(), sizes)
                if rest and beside is None:
                    moved = moved if moved is not None else self._common({x, *rest})
                    break
                if not self._is_written_to(x, y, inside):
                    yield self._part(x, y, inside | (beside or set()), sizes)
            if moved is None:
                yield "no value takes in all that its experts compute"
                return
            x = moved if moved != x else self._up(x)
        yield "no single value leads to its experts"

    def _beside(self, x: fx.Node, nodes: Collection[Any], sizes: dict[fx.Node, Product]) -> set[fx.Node] | None:
        """These and what they are computed from, if that is sizes of x and numbers alone, such as a range of tokens.

        The sizes are put into `sizes`. None where there is more to it.
        """
        found: set[fx.Node] = set()
        todo = list(nodes)
        while todo:
            node = todo.pop()
            if node == _IN or not is_fixed(node) or node in self.memory.writes:
                return None
            found.add(node)
            for one in node.all_input_nodes:
                size = size_of(x, one)
                if size is not None:
                    sizes[one] = size
                elif one not in found and one not in self.constant:
                    todo.append(one)
        written = {alias for write in self.memory.writes for alias in self.memory.written(write)}
        return found if not (found & written) else None

    def _part(self, x: fx.Node, y: fx.Node, inside: set[fx.Node], sizes: Mapping[fx.Node, Product]) -> Part:
        ordered = sorted(inside, key=self.order.__getitem__)
        used = {one for node in ordered for one in node.all_input_nodes if one in self.constant}
        return Part(x, y, tuple(ordered), tuple(sorted(used, key=self.order.__getitem__)), sizes)

    def _leaks(self, inside: set[fx.Node], y: fx.Node, core: set[fx.Node]) -> bool:
        """Whether what the experts give, other than y, or what is written to in place is used outside.

        Other results, such as the router's, may be: their operations stay.
        """
        behind = core | (_reached(self.flow, core) & inside)
        behind |= {alias for node in inside & self.memory.writes.keys() for alias in self.memory.written(node)}
        return any(
            user not in inside and not is_assertion(user) for node in behind & inside - {y} for user in node.users
        )

    def _switches(self, inside: set[fx.Node]) -> bool:
        """Whether grad mode or autocast is switched on the way."""
        places = [self.order[node] for node in inside]
        return any(min(places) < self.order[node] < max(places) for node in self.switches)

    def _is_written_to(self, x: fx.Node, y: fx.Node, inside: set[fx.Node]) -> bool:
        """Whether a write may change what the part reads or gives, or a write of the part what others read."""
        memory, last = self.memory, max(self.order[node] for node in inside)
        values, result = memory.aliases(x, *inside), memory.aliases(y)
        held = memory.aliases(*self._constants(inside), *(one for node in inside for one in memory.holders(node)))
        shown = x in result or any(user not in inside for node in result & inside - {y} for user in node.users)
        for write in memory.writes:
            changed = memory.written(write)
            if changed & held:
                return True
            if write in inside:
                if any(not self._is_own(node, x, inside) for node in changed):
                    return True
            elif (self.order[x] < self.order[write] < last and changed & values) or (shown and changed & result):
                return True
        return False

    def _is_own(self, node: fx.Node, x: fx.Node, inside: set[fx.Node]) -> bool:
        """Whether a value is the part's, or one that is computed from it behind its result."""
        return node in inside or (node is not x and self.order[node] > self.order[x] and node not in self.constant)

    def _constants(self, inside: set[fx.Node]) -> set[fx.Node]:
        """The weights that these read, and what is computed from weights on the way."""
        found: set[fx.Node] = set()
        todo = [one for node in inside for one in node.all_input_nodes if one in self.constant]
        while todo:
            node = todo.pop()
            if node not in found:
                found.add(node)
                todo += node.all_input_nodes
        return found

    def _inputs(self, node: fx.Node) -> list[Any]:
        return list(self.flow.predecessors(node))

    def _up(self, node: Any) -> Any:
        return self.above.get(node, _IN) if node != _IN else _IN

    def _common(self, nodes: Collection[Any]) -> Any:
        """The closest node that leads to all of these."""
        chains = [self._chain(node) for node in nodes]
        shared = set(chains[0]).intersection(*chains[1:])
        return next(node for node in chains[0] if node in shared)

    def _chain(self, node: Any) -> list[Any]:
        found = [node]
        while found[-1] != _IN:
            above = self._up(found[-1])
            if above == found[-1]:
                break
            found.append(above)
        return found if found[-1] == _IN else [*found, _IN]

    def _ends(self, x: fx.Node, core: set[fx.Node]) -> Iterator[fx.Node]:
        """Values that all of x's ways through the core lead to, closest first."""
        below = nx.descendants(self.flow, x)
        behind = (core | _reached(self.flow, core)) & below - {_OUT}
        # All that lead to the core, or past it into what it leads to.
        leading = (behind | _reached(self.flow.reverse(copy=False), behind)) & below
        part = self.flow.subgraph({x, *leading, _OUT}).reverse()
        closing = nx.immediate_dominators(part, _OUT)
        node, count = closing.get(x), 0
        while node is not None and node != _OUT and count < _MOST_ENDS:
            if core <= (nx.ancestors(self.flow, node) | {node}):
                yield node
                count += 1
            above = closing.get(node)
            node = above if above != node else None

    def _between(self, x: fx.Node, y: fx.Node) -> set[fx.Node]:
        found: set[fx.Node] = (nx.descendants(self.flow, x) & nx.ancestors(self.flow, y)) | {y}
        return found


def _reached(flow: Any, nodes: Collection[Any]) -> set[Any]:
    """Everything that one of the nodes leads to."""
    found: set[Any] = set()
    todo = list(nodes)
    while todo:
        for one in flow.successors(todo.pop()):
            if one not in found:
                found.add(one)
                todo.append(one)
    return found


def _is_switch(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", str(node.target))
    return any(word in name for word in ("set_grad_enabled", "autocast", "inference_mode", "no_grad"))


def value_of(node: fx.Node) -> Any:
    """What a node is known to give: a tensor without values, or a number; None if nothing is known."""
    return node.meta.get("val", node.meta.get("example_value"))


def size_of(x: fx.Node, node: fx.Node) -> Product | None:
    """The size that a node computes as one of x's, if it is; None if not, or if nothing is known."""
    given, size = value_of(x), value_of(node)
    if not isinstance(given, torch.Tensor) or not isinstance(size, torch.SymInt):
        return None
    sizes: tuple[Any, ...] = tuple(given.shape)
    dynamic = [i for i, one in enumerate(sizes) if isinstance(one, torch.SymInt)]
    for count in range(1, len(dynamic) + 1):
        for axes in itertools.combinations(dynamic, count):
            factor = size.node.expr / math.prod(sizes[i].node.expr for i in axes)
            if factor.is_Integer and factor > 0:
                return Product(int(factor), axes)
    return None


def is_assertion(node: fx.Node) -> bool:
    """A check that torch.export has written down, which gives nothing."""
    name = getattr(node.target, "__name__", str(node.target))
    return node.op == "call_function" and not node.users and name.startswith(("_assert", "sym_constrain"))
