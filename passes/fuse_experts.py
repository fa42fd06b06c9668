"""A whole layer as one op: expert_ffn for experts, dense_ffn for one FFN, expert_glu where only the head fits.

T tokens, K experts per token, E experts, D model width, F expert width, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from moec.ir import (
    Act,
    Combine,
    DenseFfn,
    Dim,
    ExpertFfn,
    ExpertGlu,
    Gather,
    Glu,
    Group,
    GroupedLinear,
    Node,
    Region,
    Value,
)
from moec.ir.rewrite import Rewriter
from moec.passbase import PassLog
from moec.passes.sites import Mismatch, Product, as_product, need, need_one_user, origin, product_of

# Functions that do not give 0 for 0; what they make of a row without expert is not what expert_glu promises.
_NOT_ZERO_AT_ZERO = ("sigmoid", "softplus")


@dataclass(frozen=True)
class FuseExperts:
    """Fuse group, gather, grouped_linear, glu or act, grouped_linear and combine into expert_ffn.

    linear, glu or act, linear become dense_ffn. Where the part behind the activation does not fit, gather,
    grouped_linear and the activation become expert_glu (`partial`). Gate and up may be one weight or two; biases and
    int8 scales go along. Fused ops drop nothing, so plan-capacity and place-experts come before.
    """

    name: ClassVar[str] = "fuse-experts"
    changes_numerics: ClassVar[bool] = False
    partial: bool = True

    def __call__(self, region: Region, log: PassLog) -> Region:
        edit = Rewriter(region)
        seen: set[Value] = set()
        for node in region.nodes:
            if isinstance(node.op, Act | Glu) and _is_site(region, node):
                self._fuse(region, edit, log, node)
                seen |= _behind(region, node)
        for node in region.nodes:
            if isinstance(node.op, Combine) and node.results[0] not in seen:
                log.skip(f"{node.results[0]}: no activation between two products comes before it")
        return edit.finish() if log.done else region

    def _fuse(self, region: Region, edit: Rewriter, log: PassLog, node: Node) -> None:
        head = None
        try:
            head = Head.match(region, node)
            tail = Tail.match(region, head)
            result, names = _replace_all(region, edit, head, tail)
            log.did(f"{result}: {names}")
            return
        except Mismatch as reason:
            log.skip(str(reason))
        if head is None or head.gate.offsets is None or not self.partial:
            return
        try:
            _replace_head(region, edit, head)
            log.did(f"{head.result}: {_listed(['gather', *head.names])} became expert_glu")
        except Mismatch as reason:
            if str(reason) not in log.skipped:
                log.skip(str(reason))


@dataclass(frozen=True)
class Head:
    """One or two products of the same rows, and the activation they feed."""

    gate: Product
    up: Product | None
    node: Node

    @property
    def result(self) -> Value:
        return self.node.results[0]

    @property
    def names(self) -> list[str]:
        count = "" if self.up is None else "2 "
        return [count + self.gate.op.name, self.node.op.name]

    @property
    def attributes(self) -> dict[str, Any]:
        """The activation's attributes as the fused ops have them."""
        layout = {"layout": "none"} if isinstance(self.node.op, Act) else {}
        return {**self.node.op.attributes, **layout}

    @classmethod
    def match(cls, region: Region, node: Node) -> Head:
        found = []
        for value in node.op.operands:
            product = product_of(region, value)
            if product is None:
                raise Mismatch(node.results[0], f"{value} comes {origin(region, value)}, not from a product")
            _check_product(product)
            need_one_user(region, value, node)
            found.append(product)
        gate, up = found[0], found[1] if len(found) == 2 else None
        if up is not None:
            both = f"{gate.result} and {up.result}"
            need(gate.op.name == up.op.name, node.results[0], f"{both} are {gate.op.name} and {up.op.name}")
            need(gate.x == up.x, node.results[0], f"{both} multiply different rows, {gate.x} and {up.x}")
            need(gate.offsets == up.offsets, node.results[0], f"{both} have different offsets")
        return cls(gate, up, node)


@dataclass(frozen=True)
class Tail:
    """The product behind the activation, and for experts the combine behind that."""

    second: Product
    combine: Node | None

    @classmethod
    def match(cls, region: Region, head: Head) -> Tail:
        grouped = head.gate.offsets is not None
        if grouped:
            _check_routing(region, head.gate)
        second = as_product(_only_user(region, head.result, "a second product"))
        wanted = "a second grouped_linear" if grouped else "a second linear"
        if second is None or second.x != head.result or (second.offsets is not None) != grouped:
            raise Mismatch(head.result, f"it goes into {region.users(head.result)[0].op.name}, not into {wanted}")
        _check_product(second)
        if not grouped:
            return cls(second, None)
        need(second.offsets == head.gate.offsets, second.result, f"other offsets than {head.gate.result}")
        combine = _only_user(region, second.result, "combine")
        return cls(second, _check_combine(region, head.gate, second, combine))


def _is_site(region: Region, node: Node) -> bool:
    """An activation between products; others (a gate's sigmoid on an input) are nobody's FFN."""
    before = any(product_of(region, value) for value in node.op.operands)
    behind = any(as_product(user) for user in region.users(node.results[0]))
    return before or behind


def _behind(region: Region, node: Node) -> set[Value]:
    """Everything computed from the node: what a site has spoken for."""
    found = set(node.results)
    for other in region.nodes:
        if not found.isdisjoint(other.op.operands):
            found.update(other.results)
    return found


def _check_product(product: Product) -> None:
    dtype, wanted = product.result.type.dtype, product.x.type.dtype
    need(product.op.x_scale is None, product.result, "its rows are int8")
    need(dtype == wanted, product.result, f"its result is {dtype} and its rows are {wanted}")


def _routing(region: Region, first: Product) -> tuple[Gather, Node, Group]:
    """The gather and the group, with its node, that a grouped product's rows come from."""
    gather, what = region.producer(first.x), "its rows come"
    if gather is None or not isinstance(gather.op, Gather):
        raise Mismatch(first.result, f"{what} {origin(region, first.x)}, not from gather")
    group = region.producer(gather.op.order)
    if group is None or not isinstance(group.op, Group):
        raise Mismatch(gather.op.order, f"it comes {origin(region, gather.op.order)}, not from group")
    need(group.results[1] == first.offsets, first.result, f"{first.offsets} are not the offsets of {gather.op.order}")
    return gather.op, group, group.op


def _check_routing(region: Region, first: Product) -> None:
    gather, node, group = _routing(region, first)
    order = node.results[0]
    need(group.by == "token", order, "experts choose tokens")
    need(group.capacity is None, order, f"slots past capacity {group.capacity} are dropped, and expert_ffn drops none")
    tokens, choices = group.ids.type.shape
    need(choices == Dim.of(gather.k), first.x, f"gather has k={gather.k} but a token has {choices} choices")
    need(gather.x.type.shape[0] == tokens, first.x, f"{gather.x} is {gather.x.type} but {group.ids} {group.ids.type}")


def _check_combine(region: Region, first: Product, second: Product, node: Node) -> Node:
    gather, _, group = _routing(region, first)
    op = node.op
    if not isinstance(op, Combine) or op.rows != second.result:
        raise Mismatch(second.result, f"it goes into {op.name}, not into combine")
    at = node.results[0]
    need(op.by == "token", at, "it combines by expert")
    need(op.order == gather.order, at, f"it combines in the order {op.order}, but the rows are in {gather.order}")
    need(op.weights.type.shape == group.ids.type.shape, at, f"{op.weights} and {group.ids} differ in shape")
    return node


def _only_user(region: Region, value: Value, wanted: str) -> Node:
    users = region.users(value)
    need(value not in region.outputs, value, "it is also an output of the region" if users else "it is an output")
    need(bool(users), value, f"it does not go into {wanted}")
    need(len(users) == 1, value, f"it is used by {_listed([user.op.name for user in users])}, not by {wanted} alone")
    return users[0]


def _replace_all(region: Region, edit: Rewriter, head: Head, tail: Tail) -> tuple[Value, str]:
    """Put the fused op where the last op of the site was; says what became of what."""
    operands = {
        "w_in": head.gate.op.w,
        "b_in": head.gate.op.b,
        "scale_in": head.gate.op.scale,
        "w_out": tail.second.op.w,
        "b_out": tail.second.op.b,
        "scale_out": tail.second.op.scale,
        **_up_operands(head),
    }
    names = [*head.names, tail.second.op.name]
    if tail.combine is None:
        node, fused = tail.second.node, DenseFfn(head.gate.x, **operands, **head.attributes)
        edit.replace_op(node, fused)
        return node.results[0], f"{_listed(names)} became dense_ffn"
    gather, _, group = _routing(region, head.gate)
    combine: Any = tail.combine.op
    edit.replace_op(tail.combine, ExpertFfn(gather.x, group.ids, combine.weights, **operands, **head.attributes))
    return tail.combine.results[0], f"{_listed(['group', 'gather', *names, 'combine'])} became expert_ffn"


def _replace_head(region: Region, edit: Rewriter, head: Head) -> None:
    gather, _, _ = _routing(region, head.gate)
    offsets = head.gate.offsets
    assert offsets is not None
    _check_rows_without_expert(region, head, gather)
    first = head.gate.op
    fused = ExpertGlu(
        gather.x,
        gather.order,
        offsets,
        first.w,
        b=first.b,
        scale=first.scale,
        k=gather.k,
        **_up_operands(head),
        **head.attributes,
    )
    edit.replace_op(head.node, fused)


def _check_rows_without_expert(region: Region, head: Head, gather: Gather) -> None:
    """Past the last offset expert_glu gives 0 and an activation fn(0): nobody may see the difference."""
    op: Any = head.node.op
    gated = isinstance(op, Glu)
    if op.fn not in _NOT_ZERO_AT_ZERO or (gated and op.up_shift == 0):
        return
    for user in region.users(head.result):
        blind = isinstance(user.op, GroupedLinear) and user.op.offsets == head.gate.offsets
        blind = blind or (isinstance(user.op, Combine) and user.op.order == gather.order)
        need(blind, head.result, f"{user.op.name} would see rows of no expert as 0 instead of {op.fn}(0)")
    need(head.result not in region.outputs, head.result, f"rows of no expert would become 0 instead of {op.fn}(0)")


def _up_operands(head: Head) -> dict[str, Any]:
    if head.up is None:
        return {}
    return {"w_up": head.up.op.w, "b_up": head.up.op.b, "scale_up": head.up.op.scale}


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
