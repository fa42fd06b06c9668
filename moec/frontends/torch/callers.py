"""Who calls a compiled layer: torch.func, a tracer or an exporter, which need the user's own operations, or a shallow
copy of the module, which has taken the compiled method along with the rest of its attributes."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.autograd import forward_ad

_transform = torch._C._functorch.peek_interpreter_stack
_tracing = torch._C._get_tracing_state
_dispatch_modes = torch._C._len_torch_dispatch_stack


def recorded_by() -> str | None:
    """What is recording or transforming operations now, and would not understand the compiled layer's."""
    if _transform() is not None:
        return "a torch.func transform is on"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is on"
    if _tracing() is not None:
        return "torch.jit.trace is recording"
    if _dispatch_modes():
        return "a TorchDispatchMode is on, which watches operations"
    return None


def copied_caller(module: torch.nn.Module, method: str, compiled: Any) -> torch.nn.Module | None:
    """The shallow copy of `module` that the call before the last was made on, if it was one.

    copy.copy and DataParallel copy a module's `__dict__`, and with it the compiled method, which no one binds anew:
    the only trace of the copy is the frame that called.
    """
    caller = sys._getframe(2).f_locals.get("self")
    if caller is module or not isinstance(caller, torch.nn.Module):
        return None
    return caller if caller.__dict__.get(method) is compiled else None
