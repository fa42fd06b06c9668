"""How layers are looked at and verified, whatever the caller has set: one at a time, no autocast, no inference mode."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

# Probes watch the process's random state and standard output, which two compilations would change for each other.
_ONE = threading.RLock()
# A run leaves many small objects that stay; looked through for cycles as often as usual they took a third of the time.
_OBJECTS = 20_000


@contextmanager
def undisturbed() -> Iterator[None]:
    """While it lasts: as above, and Python looks for garbage less often.

    Under a caller's inference_mode tensors would keep no count of the writes to them.
    """
    with _ONE, ExitStack() as modes:
        often, *rest = gc.get_threshold()
        if 0 < often < _OBJECTS:
            gc.set_threshold(_OBJECTS, *rest)
            modes.callback(gc.set_threshold, often, *rest)
        recording = torch.is_grad_enabled()
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.set_grad_enabled(recording))  # the line above turns it on
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                modes.enter_context(torch.autocast(device, enabled=False))
        yield
