"""Graphs run apart from the caller's state: on copies of tensors, with a seed of their own; and compared so."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from moec.report import Report
from moec.verify import Difference, compare_results

# A whole graph may amplify the error of its layers, and a router may choose another expert at a tie.
_AMPLIFIED, _LEAST_BAR, _MOST_BAR = 100.0, 1e-3, 0.5


class Copies:
    """Copies of tensors; those that share memory share it after too."""

    def __init__(self) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}

    def of(self, value: Any) -> Any:
        """The value with copies in the place of tensors, and numbers in the place of symbolic sizes."""
        return tree_map(self._one, value)

    def _one(self, value: Any) -> Any:
        if isinstance(value, torch.SymInt):
            return int(value.node.hint)
        if not isinstance(value, torch.Tensor):
            return value
        value = value.detach()
        plain = type(value) is torch.Tensor and value.layout == torch.strided and not value.is_quantized
        if not plain or value.is_conj() or value.is_neg():
            return value.clone()
        storage = value.untyped_storage()
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = storage.clone()
        made = torch.empty(0, dtype=value.dtype, device=value.device)
        return made.set_(self._storages[storage._cdata], value.storage_offset(), value.size(), value.stride())


def module_apart(model: nn.Module, changed: set[int]) -> nn.Module:
    """A copy over the same parameters, except those whose ids are in `changed`; buffers are copied."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if id(p) not in changed})


@contextmanager
def seeded() -> Iterator[None]:
    """With the same random numbers each time, and the caller's afterwards."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(0)
        if devices:
            torch.cuda.manual_seed_all(0)
        yield


def run_apart(call: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """What the call gives on copies of the arguments, and the copies as it leaves them."""
    copies = Copies()
    given = copies.of((tuple(args), dict(kwargs)))
    with torch.no_grad(), seeded():
        return call(*given[0], **given[1]), given


def judge(mine: Any, theirs: Any, report: Report) -> str:
    """Why two runs of whole graphs differ too much; empty if they do not. The report gets the error."""
    found: Difference = compare_results(mine, theirs)
    report.whole_model_error = found.l2
    if found.mismatch:
        return found.mismatch
    bar = max([_LEAST_BAR, *(_AMPLIFIED * layer.bar for layer in report.compiled if layer.bar)])
    bar = min(bar, _MOST_BAR)
    return "" if found.l2 <= bar else f"error {found.l2:.2e} above {bar:.0e}, {found.furthest}"
