"""Twins: copies of a module that share every parameter and buffer; and bare copies to run probes on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from moec.errors import MoecError

_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called",
)  # fmt: skip


_COUNTER_BYTES = 4096


def _may_count(param: nn.Parameter) -> bool:
    plain = type(param) is nn.Parameter and type(param.data) is torch.Tensor
    small = plain and param.numel() * param.element_size() <= _COUNTER_BYTES
    # A copy of one with gaps would lie in another way, and what is found of a probe holds for the model.
    return small and param.detach().clone().stride() == param.stride()


def make_twin(model: nn.Module, change: Callable[[torch.Tensor], torch.Tensor] | None = None) -> nn.Module:
    """A deep copy whose parameters and buffers are the model's own objects, or what `change` makes of them.

    Raises MoecError (MOEC210) when the model cannot be copied.
    """
    shared = {id(t): t if change is None else _changed(t, change) for t in _tensors(model)}
    try:
        return copy.deepcopy(model, shared)
    except MoecError:
        raise
    except Exception as error:  # a user's object may refuse in any way
        raise MoecError(
            "MOEC210",
            f"{type(model).__name__} cannot be copied: {type(error).__name__}: {error}",
            hint="pass inplace=True to compile the model itself instead of a twin",
        ) from error


def _changed(tensor: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The tensor itself where nothing changes; a parameter stays one."""
    found = change(tensor)
    if found is tensor or not isinstance(tensor, nn.Parameter):
        return found
    return nn.Parameter(found.detach(), requires_grad=tensor.requires_grad)


def make_probe(model: nn.Module) -> nn.Module:
    """A twin in eval mode with buffers and hooks of its own: running it is not seen by the model."""
    # A parameter as small as a counter may be one; weights are shared, nothing writes those in a forward.
    shared = {id(p): p for p in model.parameters() if not _may_count(p)}
    probe = copy.deepcopy(model, shared)
    for module in probe.modules():
        for name in _HOOKS:
            if getattr(module, name, None):
                getattr(module, name).clear()
    return probe.eval()


@contextmanager
def borrowed(model: nn.Module) -> Iterator[nn.Module]:
    """The model itself as its own probe: in eval mode and without hooks for a while, all put back at the end."""
    modes = [(m, m.training) for m in model.modules()]
    hooks = [
        (table, table.copy()) for m in model.modules() for name in _HOOKS for table in [getattr(m, name, None)] if table
    ]
    try:
        for table, _ in hooks:
            table.clear()
        model.eval()
        yield model
    finally:
        for module, mode in modes:
            module.training = mode
        for table, entries in hooks:
            table.update(entries)


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def closures_over(model: nn.Module) -> list[str]:
    """Names of modules with hooks that hold on to the original model's modules: on a twin they act on the original."""
    own = {id(m) for m in model.modules()}
    found = []
    for name, module in model.named_modules():
        for table in _HOOKS[:4]:
            for hook in (getattr(module, table, None) or {}).values():
                cells: tuple[Any, ...] = getattr(hook, "__closure__", None) or ()
                if any(id(c.cell_contents) in own for c in cells if _filled(c)):
                    found.append(name)
    return found


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
