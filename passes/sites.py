"""How a pass looks at a site: products of any kind alike, who else uses a value, and reasons as one line of a log.

R rows, E experts, N outputs, C inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from moec.ir import GroupedLinear, Linear, Node, Region, Value


class Mismatch(Exception):  # noqa: N818 - not an error: the pass that looks at the site catches it and logs it
    """Why a site is left alone; str() is the line for the log."""

    def __init__(self, value: Value, reason: str) -> None:
        super().__init__(f"{value}: {reason}")


def need(condition: bool, value: Value, reason: str) -> None:
    """Leave the site alone unless the condition holds."""
    if not condition:
        raise Mismatch(value, reason)


@dataclass(frozen=True)
class Product:
    """linear and grouped_linear seen alike: x times w, per expert if there are offsets."""

    node: Node
    op: Linear | GroupedLinear

    @property
    def x(self) -> Value:
        return self.op.x if isinstance(self.op, Linear) else self.op.rows

    @property
    def offsets(self) -> Value | None:
        return None if isinstance(self.op, Linear) else self.op.offsets

    @property
    def result(self) -> Value:
        return self.node.results[0]


def as_product(node: Node | None) -> Product | None:
    return Product(node, node.op) if node is not None and isinstance(node.op, Linear | GroupedLinear) else None


def product_of(region: Region, value: Value) -> Product | None:
    """The product that computes the value, if one does."""
    return as_product(region.producer(value))


def origin(region: Region, value: Value) -> str:
    """Where a value comes from, to end a sentence: "from exchange", "from the region's inputs"."""
    node = region.producer(value)
    return "from the region's inputs" if node is None else f"from {node.op.name}"


def need_one_user(region: Region, value: Value, user: Node) -> None:
    """The value must be gone once this user is: nothing else may need it."""
    need(value not in region.outputs, value, "it is also an output of the region")
    for other in region.users(value):
        need(other.results == user.results, value, f"it is also used by {other.op.name}")


def is_weight(region: Region, value: Value) -> bool:
    """Whether the value depends on weights only, so that a back end can change it once, when it builds."""
    node = region.producer(value)
    return node is not None and node.op.of_weights and all(is_weight(region, part) for part in node.op.operands)


def need_weight(region: Region, value: Value) -> None:
    """A weight of known size: what is done to it is done once, and its bytes are reported."""
    need(is_weight(region, value), value, f"it comes {origin(region, value)} and is no weight")
    need(not value.type.letters, value, f"its size {value.type} is not known")


def num_bytes(weight: Value) -> int:
    """Bytes of a weight that need_weight let through."""
    return weight.type.num_bytes({})
