"""Small modules around plain functions, so that a test can record a few lines of code and look at the log.

T tokens, D width, F hidden width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moec.frontends.torch.body import view_tensor
from moec.frontends.torch.oplog import Log, Ref
from moec.frontends.torch.recorder import record
from moec.weights import View


class Do(nn.Module):
    """A module whose forward is a function of itself and the arguments."""

    def __init__(self, does: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.__dict__["does"] = does
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if type(part) is Tensor else part)

    def forward(self, *args: Any) -> Any:
        return self.__dict__["does"](self, *args)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def log_of(does: Callable[..., Any], *args: Any, **parts: Any) -> Log:
    """The log of one run of the function on a module with these parts."""
    return record(Do(does, **parts).eval(), args, {})


def params_of(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters(remove_duplicate=False))


def slot_of(leaf: Any) -> int:
    assert isinstance(leaf, Ref)
    return leaf.slot


def result(log: Log) -> int:
    """Slot of the one tensor the run returned."""
    return slot_of(log.result)


def given(log: Log, position: int = 0) -> int:
    """Slot of an argument of the outermost call."""
    return slot_of(log.sites[0].args[position])


def names(log: Log) -> list[str]:
    return [entry.name for entry in log.entries]


def value(log: Log, slot: int, at: int | None = None) -> Tensor:
    """The value, which the log must have kept."""
    found = log.value(slot, at)
    assert found is not None
    return found


def read(params: dict[str, Tensor], views: Sequence[View] | View) -> Any:
    """The tensor (or one for each expert) behind views."""
    if isinstance(views, View):
        return view_tensor(params, views)
    return [view_tensor(params, view) for view in views]
