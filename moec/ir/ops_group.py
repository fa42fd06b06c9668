"""From chosen experts to rows sorted by expert, and to devices.

T tokens, K experts per token, E experts, D model width, R rows, C capacity. A **slot** is one choice of one token: slot
t*K + j is token t's j-th choice.
"""

from dataclasses import KW_ONLY, dataclass

from moec.ir.core import Op, Value, op, require
from moec.ir.ops_linear import check_offsets
from moec.ir.rules import (
    require_at_least,
    require_choice,
    require_float,
    require_index,
    require_positive,
    require_rank,
    require_shape,
    require_size,
)
from moec.ir.types import Dim, Tensor

SIDES = ("token", "expert")
POLICIES = ("arrival", "weight", "token_weight")
PRIORITIES = ("token", "choice")
SCOPES = ("batch", "sequence")


@op("group")
@dataclass(frozen=True)
class Group(Op):
    """ids[T, K], weights[T, K]? -> order i32[R], offsets i32[E+1]: slots sorted by expert.

    Without `capacity`, by="token" (the default). R = T*K. order lists the slots of expert 0 in ascending order, then
    those of expert 1, and so on: a stable sort. Expert e's slots are order[offsets[e]:offsets[e+1]]; offsets[0] = 0.
    A slot whose id is outside 0..E-1 (a sentinel for "no expert") is **left out**: it is in no expert's part.
    offsets[E] is the number of slots kept, and order[offsets[E]:] is filled with -1, so that shapes do not depend on
    the routing. Dropless means that nothing else is left out. For a row whose order is -1, `gather` gives zeros,
    `grouped_linear` gives zeros (it lies past offsets[E]) and `combine` adds nothing.

    With `capacity` = C, by="token". Each expert keeps at most C slots **per scope**, and the others are left out as
    above. The kept slots stay in ascending order: what was dropped never changes the order of the rest.
      scope="batch": all T tokens share one capacity. scope="sequence": tokens 0..S-1, S..2S-1, ... (S = `sequence`,
      the last part may be shorter) have C places at each expert of their own. C is the same for each part.
      priority="token": all slots of the scope compete at once. priority="choice": all first choices (j=0) come before
      all second choices (j=1), and so on.
      policy, among slots of equal priority: "arrival", the lower slot first; "weight", the larger weights[t, j]
      first; "token_weight", the slots of tokens with the larger max_j weights[t, j] first. Ties, and NaN (which comes
      last), go by the lower slot. The two by weight need the `weights` operand, and nothing else may have it.
    So the defaults are plain arrival order: slot s keeps its place when fewer than C slots below s, in the same scope,
    chose the same expert. C may be any size (`ceildiv(5T, 32)`), evaluated for the T of the call. When a token's
    choices differ, C >= T drops nothing.

    by="expert" (expert choice). ids is the `tokens` [E, C] of `route_experts`. R = E*C, order is ids flattened (an
    entry is a **token**, not a slot; -1 is an empty place and stays where it is), offsets = 0, C, 2C, ... Capacity and
    what goes with it must be left at the defaults. Use it with gather {k=1}, and scale_rows and combine {by="expert"}.
    """

    ids: Value
    weights: Value | None = None
    _: KW_ONLY
    experts: int
    capacity: Dim | None = None
    policy: str = "arrival"
    priority: str = "token"
    scope: str = "batch"
    sequence: Dim | None = None
    by: str = "token"

    def infer(self) -> tuple[Tensor, ...]:
        require_index("ids", self.ids)
        require_rank("ids", self.ids, 2)
        require_at_least("experts", self.experts, 1)
        require_choice("by", self.by, SIDES)
        self._check_capacity()
        if self.by == "expert":
            require_size("the first size of ids", self.ids.type.shape[0], Dim.of(self.experts), 'with by="expert"')
        rows = self.ids.type.shape[0] * self.ids.type.shape[1]
        return Tensor("i32", (rows,)), Tensor.of("i32", self.experts + 1)

    def _check_capacity(self) -> None:
        require_choice("policy", self.policy, POLICIES)
        require_choice("priority", self.priority, PRIORITIES)
        require_choice("scope", self.scope, SCOPES)
        plain = self.policy == "arrival" and self.priority == "token" and self.scope == "batch"
        message = "policy, priority and scope say which slots to drop: they need capacity"
        require(self.capacity is not None or plain, "MOEC106", message)
        if self.capacity is not None:
            require(self.by == "token", "MOEC106", 'capacity goes with by="token": with by="expert" ids has it')
            require_positive("capacity", self.capacity)
        paired = (self.sequence is not None) == (self.scope == "sequence")
        require(paired, "MOEC106", 'sequence, the tokens of one sequence, goes with scope="sequence" and only with it')
        if self.sequence is not None:
            require_positive("sequence", self.sequence)
        needed = self.policy in ("weight", "token_weight")
        message = f'policy="{self.policy}" ' + ("needs weights" if needed else "takes no weights")
        require(needed == (self.weights is not None), "MOEC106", message)
        if self.weights is not None:
            require_float("weights", self.weights)
            require_shape("weights", self.weights, self.ids.type.shape, f"like ids {self.ids.type}")


@op("gather")
@dataclass(frozen=True)
class Gather(Op):
    """x[T, D], order[R] -> rows[R, D]: rows[r] = x[order[r] // k], and zeros where order[r] is -1.

    `k` is K, the slots of a token; 1 where order holds tokens (expert choice).
    """

    x: Value
    order: Value
    _: KW_ONLY
    k: int

    def infer(self) -> tuple[Tensor, ...]:
        require_rank("x", self.x, 2)
        require_index("order", self.order)
        require_rank("order", self.order, 1)
        require_at_least("k", self.k, 1)
        return (Tensor(self.x.type.dtype, (self.order.type.shape[0], self.x.type.shape[1])),)


@op("exchange")
@dataclass(frozen=True)
class Exchange(Op):
    """rows[R, D], offsets i32[E+1] -> rows[R, D], offsets i32[E+1]: rows to their experts' devices, or back.

    owners[e] is the device, in 0..devices-1, of expert e; a device may own none. **Device order** is the experts
    sorted by owner, stably: device 0's experts in ascending order, then device 1's. The result has the experts'
    segments one after the other in device order, each unchanged inside, and the offsets of that order: device d's rows
    are then one contiguous part. Weights used on them must be in device order too (`select_experts`). Rows from
    offsets[E] on (no expert) stay at the end and come out as zeros.

    With `back` the operands are in device order and the results in the experts' own order: the exact inverse. Executed
    in one process this is a permutation of segments, bit for bit; a distributed back end makes it an all-to-all.
    """

    rows: Value
    offsets: Value
    _: KW_ONLY
    owners: tuple[int, ...]
    devices: int
    back: bool = False

    def infer(self) -> tuple[Tensor, ...]:
        require_rank("rows", self.rows, 2)
        require_at_least("devices", self.devices, 1)
        require(len(self.owners) >= 1, "MOEC102", "owners must name a device for each expert")
        for expert, owner in enumerate(self.owners):
            message = f"expert {expert}'s owner {owner} must be in 0..{self.devices - 1}"
            require(0 <= owner < self.devices, "MOEC102", message)
        check_offsets(self.offsets, Dim.of(len(self.owners)), f"for {len(self.owners)} owners")
        return self.rows.type, self.offsets.type

    def device_order(self) -> tuple[int, ...]:
        """The experts in device order."""
        return tuple(sorted(range(len(self.owners)), key=lambda expert: self.owners[expert]))
