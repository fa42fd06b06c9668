"""The user's own code, kept verbatim."""

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from moec.ir.core import Op, Value, op, require
from moec.ir.types import Tensor


@op("opaque")
@dataclass(frozen=True)
class Opaque(Op):
    """any values -> results of the declared types, computed by the graph that the Program knows by this name.

    A router, an epilogue, an odd expert body; any number of operands (token ids, masks). Never merged, moved past
    another opaque op or dropped: what else the graph does is not known.
    """

    pure: ClassVar[bool] = False
    args: tuple[Value, ...] = ()
    _: KW_ONLY
    graph: str
    types: tuple[Tensor, ...]

    def infer(self) -> tuple[Tensor, ...]:
        require(self.graph != "", "MOEC102", "graph must not be empty")
        require(len(self.types) >= 1, "MOEC125", "must declare the types of its results")
        return self.types
