"""Passes: one rewrite of the IR per file, each a frozen dataclass whose fields are its options."""

# The folder stands at the root but its import name is moec.passes; under another name its classes would exist twice.
if __name__ != "moec.passes":
    raise ImportError("import moec.passes, not passes")

from typing import Any

from moec.passes.canonicalize import Canonicalize
from moec.passes.fuse_experts import FuseExperts
from moec.passes.merge_gate_up import MergeGateUp
from moec.passes.place_experts import PlaceExperts
from moec.passes.plan_capacity import PlanCapacity
from moec.passes.quantize_experts import QuantizeExperts

# In the order in which they run best; `moec passes` lists them so.
PASSES: tuple[type[Any], ...] = (Canonicalize, PlanCapacity, PlaceExperts, QuantizeExperts, MergeGateUp, FuseExperts)

__all__ = [
    "PASSES",
    "Canonicalize",
    "FuseExperts",
    "MergeGateUp",
    "PlaceExperts",
    "PlanCapacity",
    "QuantizeExperts",
]
