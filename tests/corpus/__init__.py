"""A corpus of small modules that a front end for MoE layers must compile rightly or refuse with the reason."""

from __future__ import annotations

import tests.corpus.batch
import tests.corpus.combine
import tests.corpus.dense_ffn
import tests.corpus.effects
import tests.corpus.experts
import tests.corpus.hand_written
import tests.corpus.near_misses
import tests.corpus.not_moe
import tests.corpus.positive_moe
import tests.corpus.selection
import tests.corpus.weights  # noqa: F401
from tests.corpus.case import CASES, Case

__all__ = ["CASES", "Case"]
