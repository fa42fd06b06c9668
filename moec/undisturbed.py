"""How layers are looked at and verified, whatever the caller has set: one at a time, no autocast, no inference mode."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

# Probes watch the process's random state and standard output, which two compilations would change for each other.
_ONE = threading.RLock()


@contextmanager
def undisturbed() -> Iterator[None]:
    """While it lasts: as above. Under a caller's inference_mode tensors would keep no count of the writes to them."""
    with _ONE, ExitStack() as modes:
        recording = torch.is_grad_enabled()
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.set_grad_enabled(recording))  # the line above turns it on
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                modes.enter_context(torch.autocast(device, enabled=False))
        yield
