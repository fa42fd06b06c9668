"""A corpus of small modules that a front end for MoE layers must compile rightly or refuse with the reason."""

from __future__ import annotations

from tests.corpus import (  # noqa: F401 - each registers its cases
    batch,
    combine,
    dense_ffn,
    effects,
    expert_choice,
    experts,
    hand_written,
    masked,
    multitask,
    near_misses,
    not_moe,
    odd_bodies,
    older,
    placed,
    positive_moe,
    retrieval,
    scaled,
    selection,
    weights,
    wider,
)
from tests.corpus.case import CASES, Case
from tests.corpus.inlined import add_inlined

add_inlined()

__all__ = ["CASES", "Case"]
