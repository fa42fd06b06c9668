"""Changing a region: a pass adds, replaces and redirects; types follow, dead nodes go, the result is verified."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from moec.ir.builder import Names
from moec.ir.core import Node, Op, Region, Value
from moec.ir.verify import verify


class Rewriter:
    """Edits a copy of a region; `finish` gives the new region and leaves the old one as it is.

    ```python
    edit = Rewriter(region)
    for node in region.nodes:
        if isinstance(node.op, Act) and node.op.fn == "identity":
            edit.redirect(node.results[0], node.op.x)
    region = edit.finish()
    ```
    Nodes and values of the original region stay valid handles during the edit, also after their operands or types have
    changed.
    """

    def __init__(self, region: Region) -> None:
        self.region = region
        self.nodes = list(region.nodes)
        self.outputs = list(region.outputs)
        self.names = Names([value.name for value in region.values])

    def current(self, node: Node) -> Node:
        """The node as the edit has left it: the same results' names, perhaps other operands or another op."""
        return self.nodes[self._position(node)]

    def add(self, op: Op, name: str | None = None, *, before: Node | None = None, after: Node | None = None) -> Value:
        """Insert an op with one result beside a node, or at the end; a name that is taken gets a number behind it."""
        (value,) = self.add_many(op, (name or op.name,), before=before, after=after)
        return value

    def add_many(
        self, op: Op, names: Sequence[str], *, before: Node | None = None, after: Node | None = None
    ) -> tuple[Value, ...]:
        """Insert an op and give its results, one for each name. Raises what the op's type rule raises."""
        types = op.result_types()
        assert len(names) == len(types), f"{op.name} defines {len(types)} values, not {len(names)}"
        assert before is None or after is None, "before or after, not both"
        values = tuple(Value(self.names.fresh(name), type) for name, type in zip(names, types, strict=True))
        at = len(self.nodes)
        if before is not None:
            at = self._position(before)
        elif after is not None:
            at = self._position(after) + 1
        self.nodes.insert(at, Node(values, op))
        return values

    def replace_op(self, node: Node, op: Op) -> None:
        """Let another op define the node's results. Users follow when the types change."""
        at = self._position(node)
        self.nodes[at] = Node(self.nodes[at].results, op)

    def redirect(self, old: Value, new: Value) -> None:
        """Let all users of `old`, outputs included, use `new`; only the op that defines `new` keeps using `old`."""
        for at, node in enumerate(self.nodes):
            if all(value.name != new.name for value in node.results):
                self.nodes[at] = Node(node.results, node.op.map_operands(lambda v: new if v.name == old.name else v))
        self.outputs = [new if value.name == old.name else value for value in self.outputs]

    def finish(self) -> Region:
        """The new region: types inferred again from the inputs on, dead nodes dropped, verified."""
        nodes: list[Node] = []
        known = {value.name: value for value in self.region.inputs}
        for node in self.nodes:
            op = _retyped(node.op, known)
            types = op.result_types()
            assert len(types) == len(node.results), f"{op.name} cannot define {len(node.results)} values"
            results = tuple(Value(value.name, type) for value, type in zip(node.results, types, strict=True))
            known |= {value.name: value for value in results}
            nodes.append(Node(results, op))
        outputs = tuple(known.get(value.name, value) for value in self.outputs)
        region = drop_dead(replace(self.region, nodes=tuple(nodes), outputs=outputs))
        verify(region)
        return region

    def _position(self, node: Node) -> int:
        # By name: a node's op and types may have changed since the caller got hold of it.
        name = node.results[0].name
        for at, other in enumerate(self.nodes):
            if any(value.name == name for value in other.results):
                return at
        raise AssertionError(f"no node of this region defines %{name}")


def _retyped(op: Op, known: Mapping[str, Value]) -> Op:
    return op.map_operands(lambda value: known.get(value.name, value))


def drop_dead(region: Region) -> Region:
    """The region without the nodes whose results nothing uses; ops that are not pure stay."""
    used = {value.name for value in region.outputs}
    kept: list[Node] = []
    for node in reversed(region.nodes):
        if node.op.pure and not any(value.name in used for value in node.results):
            continue
        kept.append(node)
        used |= {value.name for value in node.op.operands}
    return replace(region, nodes=tuple(reversed(kept)))


def substitute(region: Region, values: Mapping[Value, Value]) -> Region:
    """The region with operands and outputs replaced; the nodes that define the old values stay."""
    return replace(
        region,
        nodes=tuple(
            Node(node.results, node.op.map_operands(lambda value: values.get(value, value))) for node in region.nodes
        ),
        outputs=tuple(values.get(value, value) for value in region.outputs),
    )
