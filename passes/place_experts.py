"""Experts on devices: rows travel to their experts and back. R rows, E experts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

from moec.errors import MoecError
from moec.ir import (
    Act,
    Add,
    BatchNorm,
    Combine,
    Dim,
    Exchange,
    ExpertFfn,
    ExpertGlu,
    Glu,
    GroupedLinear,
    Mul,
    Node,
    Norm,
    QuantizeRows,
    Region,
    ScaleRows,
    SelectExperts,
    Value,
)
from moec.ir.rewrite import Rewriter
from moec.passbase import PassLog, check_options, require_option
from moec.passes.sites import Mismatch, need, need_weight

# Ops that treat each row alike and look at nothing beside it: they run wherever their rows are.
_ROWWISE = (Act, Add, Glu, Mul, Norm, QuantizeRows)


@dataclass(frozen=True)
class PlaceExperts:
    """Give each expert a device and exchange the rows round the experts' ops.

    `owners` names each expert's device; without it expert e is on device e modulo `devices`. Weights are put in the
    order of devices (select_experts). Executed in one process this is a permutation, and results are equal bit by bit.
    Fused experts keep their rows to themselves, so this comes before fuse-experts.
    """

    name: ClassVar[str] = "place-experts"
    changes_numerics: ClassVar[bool] = False
    before: ClassVar[tuple[str, ...]] = ("fuse-experts",)
    devices: int
    owners: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_options(self)
        require_option(self, "devices", self.devices >= 1, "at least 1")
        inside = all(0 <= owner < self.devices for owner in self.owners or ())
        require_option(self, "owners", inside and self.owners != (), f"one device in 0..{self.devices - 1} per expert")

    def __call__(self, region: Region, log: PassLog) -> Region:
        for node in region.nodes:
            if isinstance(node.op, ExpertFfn):
                log.skip(f"{node.results[0]}: experts are fused; place-experts comes before fuse-experts")
        for offsets in dict.fromkeys(
            offsets for node in region.nodes if (offsets := _expert_offsets(node)) is not None
        ):
            try:
                region = self._place(region, offsets, log)
            except Mismatch as reason:
                log.skip(str(reason))
        return region

    def _place(self, region: Region, offsets: Value, log: PassLog) -> Region:
        producer = region.producer(offsets)
        need(producer is None or not isinstance(producer.op, Exchange), offsets, "its experts are placed already")
        need(self.devices > 1, offsets, "one device needs no exchange")
        owners = self._owners(offsets)
        journey = _Journey(region, offsets, owners, self.devices)
        for node in region.nodes:
            journey.visit(node)
        counts = " + ".join(str(owners.count(device)) for device in range(self.devices))
        after = journey.finish()
        log.did(f"{offsets}: {len(owners)} experts on {self.devices} devices, {counts}")
        return after

    def _owners(self, offsets: Value) -> tuple[int, ...]:
        num_experts = (offsets.type.shape[0] - 1).constant
        if num_experts is None:
            raise Mismatch(offsets, f"the number of experts is not known, {offsets.type}")
        if self.owners is None:
            return tuple(expert % self.devices for expert in range(num_experts))
        if len(self.owners) != num_experts:
            raise MoecError(
                "MOEC310",
                f"owners names {len(self.owners)} devices but {offsets} has {num_experts} experts",
                hint="give one device for each expert, or leave owners out for round-robin",
            )
        return self.owners


def _expert_offsets(node: Node) -> Value | None:
    """The offsets of an op that uses each expert's own weights on rows sorted by expert."""
    return node.op.offsets if isinstance(node.op, BatchNorm | GroupedLinear | ExpertGlu | Norm) else None


class _Journey:
    """Takes the rows of one `offsets` to the devices and back, at the last moment and each value once."""

    def __init__(self, region: Region, offsets: Value, owners: tuple[int, ...], devices: int) -> None:
        self.region = region
        self.edit = Rewriter(region)
        self.offsets = offsets
        self.owners, self.devices = owners, devices
        self.offsets_away: Value | None = None
        self.away: dict[Value, Value] = {}
        """Rows by their name in the region, where they are on the devices."""
        self.home: dict[Value, Value] = {}
        self.selected: dict[Value, Value] = {}
        self.num_rows: Dim | None = None

    def visit(self, node: Node) -> None:
        if _expert_offsets(node) == self.offsets:
            need(not isinstance(node.op, ExpertGlu), node.results[0], "it is fused; place-experts comes first")
            self._run_away(node, {name: self._expert_operand(node, name, v) for name, v in node.op.named_operands})
        elif self._is_rowwise(node):
            self._run_away(node, {name: self._row_operand(node, v) for name, v in node.op.named_operands})
        elif not self.away.keys().isdisjoint(node.op.operands):
            back = {v: self._back(v, node) for v in dict.fromkeys(node.op.operands) if v in self.away}
            self.edit.replace_op(node, node.op.map_operands(lambda value: back.get(value, value)))

    def finish(self) -> Region:
        self.edit.outputs = [self._back(value, None) if value in self.away else value for value in self.region.outputs]
        return self.edit.finish()

    def _run_away(self, node: Node, operands: dict[str, Value]) -> None:
        self.edit.replace_op(node, replace(node.op, **cast(Any, operands)))
        self.away.update((value, value) for value in node.results)

    def _is_rowwise(self, node: Node) -> bool:
        if not isinstance(node.op, _ROWWISE) or self.away.keys().isdisjoint(node.op.operands):
            return False
        return all(self._is_rows(value) for value in node.results)

    def _is_rows(self, value: Value) -> bool:
        return value.type.rank == 2 and value.type.shape[0] == self.num_rows

    def _expert_operand(self, node: Node, name: str, value: Value) -> Value:
        if name == "offsets":
            assert self.offsets_away is not None  # rows is the field before it
            return self.offsets_away
        if name in ("rows", "x", "x_scale"):
            self.num_rows = value.type.shape[0]
            return self._there(node, value)
        if value not in self.selected:
            need_weight(self.region, value)
            experts = Exchange(value, value, owners=self.owners, devices=self.devices).device_order()
            self.selected[value] = self.edit.add(
                SelectExperts(value, experts=experts), f"{value.name}_away", before=node
            )
        return self.selected[value]

    def _row_operand(self, node: Node, value: Value) -> Value:
        """Rows travel; a vector that all rows share stays as it is."""
        return self._there(node, value) if self._is_rows(value) else value

    def _there(self, node: Node, value: Value) -> Value:
        if value not in self.away:
            exchange = Exchange(value, self.offsets, owners=self.owners, devices=self.devices)
            names = (f"{value.name}_away", f"{self.offsets.name}_away")
            rows, offsets = self.edit.add_many(exchange, names, before=node)
            self.offsets_away = self.offsets_away or offsets
            self.away[value] = rows
        return self.away[value]

    def _back(self, value: Value, user: Node | None) -> Value:
        """The rows in their own order again, for a node or, without one, for the region's outputs."""
        if self.away[value] != value:
            return value  # it was sent from here and is here still
        if value not in self.home:
            source = self.region.producer(value)
            # exchange gives zeros for rows of no expert: so do an expert's ops, and combine does not look at them.
            zeros = source is not None and _expert_offsets(source) is not None
            blind = user is not None and isinstance(user.op, Combine | ScaleRows)
            what = "the region's outputs" if user is None else user.op.name
            need(zeros or blind, value, f"{what} would see rows of no expert as 0")
            assert self.offsets_away is not None
            exchange = Exchange(value, self.offsets_away, owners=self.owners, devices=self.devices, back=True)
            names = (f"{value.name}_home", f"{self.offsets.name}_home")
            self.home[value] = self.edit.add_many(exchange, names, before=user)[0]
        return self.home[value]
