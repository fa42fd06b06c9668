"""Which ops have a fast way on a CPU."""

from __future__ import annotations

from moec.backends.cpu.dense_ffn import FastDense
from moec.backends.cpu.expert_ffn import FastExperts
from moec.backends.reference.fast import Fast
from moec.ir import DenseFfn, ExpertFfn, Op


def plan(op: Op) -> Fast | None:
    """The fast way for an op, None where its meaning is all there is."""
    if isinstance(op, ExpertFfn):
        return FastExperts(op)
    if isinstance(op, DenseFfn):
        return FastDense(op)
    return None
