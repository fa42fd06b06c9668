"""A limit on the slots each expert takes. T tokens, K choices of a token, E experts, C capacity."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar, Literal

from moec.ir import Dim, ExpertFfn, Group, Node, Region
from moec.ir.rewrite import Rewriter
from moec.passbase import PassLog, check_options, require_option
from moec.passes.sites import Mismatch, need


@dataclass(frozen=True)
class PlanCapacity:
    """capacity = ceil(tokens * k / experts * factor), rounded up to `multiple`; later slots are dropped.

    `tokens` is the size to plan for; without it, the tokens of each call. scope="batch": all tokens share the
    capacity. scope="sequence": every `tokens` consecutive tokens are one sequence with a capacity of its own. Slots are
    dropped in order of arrival, and a dropped slot adds nothing to its token. Fused experts drop nothing, so this comes
    before fuse-experts.
    """

    name: ClassVar[str] = "plan-capacity"
    changes_numerics: ClassVar[bool] = True
    before: ClassVar[tuple[str, ...]] = ("fuse-experts",)
    tokens: int | None = None
    factor: float = 1.25
    multiple: int = 16
    scope: Literal["batch", "sequence"] = "batch"

    def __post_init__(self) -> None:
        check_options(self)
        require_option(self, "tokens", self.tokens is None or self.tokens >= 1, "at least 1")
        require_option(self, "factor", 0 < self.factor < float("inf"), "a number above 0")
        require_option(self, "multiple", self.multiple >= 1, "at least 1")
        planned = self.scope == "batch" or self.tokens is not None
        require_option(self, "scope", planned, "given together with tokens, the length of a sequence")

    def __call__(self, region: Region, log: PassLog) -> Region:
        edit = Rewriter(region)
        for node in region.nodes:
            try:
                if isinstance(node.op, ExpertFfn):
                    raise Mismatch(
                        node.results[0], "fused experts drop nothing; plan-capacity comes before fuse-experts"
                    )
                if isinstance(node.op, Group):
                    self._plan(edit, node, node.op, log)
            except Mismatch as reason:
                log.skip(str(reason))
        return edit.finish() if log.done else region

    def capacity(self, group: Group) -> Dim:
        """The planned capacity of one expert, a number or a size that depends on T."""
        tokens = group.ids.type.shape[0] if self.tokens is None else Dim.of(self.tokens)
        # The factor as it is written: 1.1 is eleven tenths, not the binary fraction beside it.
        factor = Fraction(repr(self.factor))
        slots = tokens * group.ids.type.shape[1] * factor.numerator
        least = slots.ceildiv(group.experts * factor.denominator)
        return least.ceildiv(self.multiple) * self.multiple

    def _plan(self, edit: Rewriter, node: Node, group: Group, log: PassLog) -> None:
        order = node.results[0]
        need(group.by == "token", order, "experts choose tokens and take as many as they have places")
        need(group.capacity is None, order, f"it has a capacity already, {group.capacity}")
        capacity = self.capacity(group)
        sequence = Dim.of(self.tokens) if self.scope == "sequence" and self.tokens is not None else None
        edit.replace_op(node, replace(group, capacity=capacity, scope=self.scope, sequence=sequence))
        per = "batch" if sequence is None else f"sequence of {sequence} tokens"
        log.did(f"{order}: each of {group.experts} experts takes at most {capacity} slots of a {per}, in arrival order")
