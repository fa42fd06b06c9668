"""One product instead of two where gate and up read the same rows. R rows, E experts, F expert width, D model width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

from moec.ir import ConcatWeights, Glu, Node, Region, Value
from moec.ir.rewrite import Rewriter
from moec.passbase import PassLog
from moec.passes.sites import Mismatch, Product, need, need_one_user, need_weight, num_bytes, origin, product_of

_Pair = tuple[Value | None, Value | None]


@dataclass(frozen=True)
class MergeGateUp:
    """Join the gate and up weights of a glu into one weight, and their two products into one.

    Works on linear and grouped_linear and on fused ops with layout="pair"; biases and scales are joined too. Exact.
    The joined weight is a copy; the log's number bytes_copied says how large.
    """

    name: ClassVar[str] = "merge-gate-up"
    changes_numerics: ClassVar[bool] = False

    def __call__(self, region: Region, log: PassLog) -> Region:
        edit = Rewriter(region)
        for node in region.nodes:
            if getattr(node.op, "layout", None) != "pair":
                continue
            try:
                site = _Site(region, edit, log)
                site.merge_products(node, node.op) if isinstance(node.op, Glu) else site.merge_fused(node)
            except Mismatch as reason:
                log.skip(str(reason))
        return edit.finish() if log.done else region


# The operands of a product that have one part for each output, and what a reason calls them.
_PARTS = {"w": "weights", "b": "biases", "scale": "scales"}


@dataclass(frozen=True)
class _Site:
    region: Region
    edit: Rewriter
    log: PassLog

    def merge_products(self, node: Node, op: Glu) -> None:
        assert op.up is not None
        gate, up = self._product(node, op.gate), self._product(node, op.up)
        self._check_products(node, gate, up)
        parts = {name: (getattr(gate.op, name), getattr(up.op, name)) for name in _PARTS}
        self._check_parts(node, parts)
        # Whichever product comes later has all operands of both in front of it.
        later = max(gate.node, up.node, key=self.region.nodes.index)
        joined = {name: self._join(node, later, name, *pair) for name, pair in parts.items()}
        both = self.edit.add(replace(gate.op, **cast(Any, joined)), "gate_up", before=later)
        self.edit.replace_op(node, replace(op, gate=both, up=None, layout="concat"))

    def merge_fused(self, node: Node) -> None:
        op: Any = node.op
        own = "_in" if hasattr(op, "w_in") else ""
        parts = {name: (getattr(op, name + own), getattr(op, name + "_up")) for name in _PARTS}
        self._check_parts(node, parts)
        changes: dict[str, Any] = {"layout": "concat"}
        for name, pair in parts.items():
            changes[name + own] = self._join(node, node, name, *pair)
            changes[name + "_up"] = None
        self.edit.replace_op(node, replace(op, **changes))

    def _product(self, node: Node, value: Value) -> Product:
        found = product_of(self.region, value)
        if found is None:
            raise Mismatch(node.results[0], f"{value} comes {origin(self.region, value)}, not from a product")
        return found

    def _check_products(self, node: Node, gate: Product, up: Product) -> None:
        at = node.results[0]
        g, u = gate.result, up.result
        need(g != u, at, f"gate and up are both {g}")
        need(gate.op.name == up.op.name, at, f"{g} is a {gate.op.name} but {u} is a {up.op.name}")
        need(gate.x == up.x, at, f"{g} and {u} multiply different rows, {gate.x} and {up.x}")
        need(gate.offsets == up.offsets, at, f"{g} and {u} have different offsets, {gate.offsets} and {up.offsets}")
        need(gate.op.x_scale == up.op.x_scale, at, f"{g} and {u} have different x_scale")
        for value in (g, u):
            need_one_user(self.region, value, node)

    def _check_parts(self, node: Node, parts: Mapping[str, _Pair]) -> None:
        at = node.results[0]
        for name, (gate, up) in parts.items():
            what = _PARTS[name]
            need((gate is None) == (up is None), at, f"{'up' if gate is None else 'gate'} alone has {what}")
            if gate is None or up is None:
                continue
            need(gate.type == up.type, at, f"the {what} of gate and up differ, {gate.type} and {up.type}")
            for value in (gate, up):
                need_weight(self.region, value)

    def _join(self, node: Node, before: Node, name: str, gate: Value | None, up: Value | None) -> Value | None:
        """gate and up one after the other along their outputs, or None if both are absent."""
        if gate is None or up is None:
            return None
        axis = gate.type.rank - (2 if name == "w" else 1)
        both = self.edit.add(ConcatWeights((gate, up), axis=axis), f"{name}_gate_up", before=before)
        self.log.did(f"{node.results[0]}: {gate} and {up} became {both}")
        self.log.add("bytes_copied", num_bytes(both))
        return both
