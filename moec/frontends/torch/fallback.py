"""How a compiled layer says that it runs its original code: a warning once, a count, an error under strict."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

from moec.errors import MoecError
from moec.report import LayerReport

# Folders whose frames are passed over on the way to the user's line.
_INSIDE = (str(Path(__file__).parents[2]), str(Path(torch.__file__).parent))

_MOST_REASONS = 16


class FallbackWarning(UserWarning):
    """A compiled layer ran its original code for a call."""


def note_fallback(layer: LayerReport, reason: str, *, strict: bool) -> None:
    """Count a call that the original code answers. Raises MOEC231 under strict."""
    name = layer.name or "the model"
    if strict:
        raise MoecError("MOEC231", f"{name} cannot run compiled: {reason}", hint="strict=True forbids falling back")
    if layer.fallbacks == 0:
        text = f"[MOEC231] {name} runs its original code: {reason} (said once)"
        warnings.warn(text, FallbackWarning, stacklevel=_level_of_the_user())
    layer.fallbacks += 1
    reasons = layer.fallback_reasons
    # Reasons name values of the call, of which there may be any number.
    key = reason if reason in reasons or len(reasons) < _MOST_REASONS else "other reasons"
    reasons[key] = reasons.get(key, 0) + 1


def _level_of_the_user() -> int:
    """The caller's `stacklevel` for a warning that points outside of torch and of moec."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    return level
