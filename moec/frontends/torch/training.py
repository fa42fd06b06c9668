"""Whether a layer computes the same in training mode as in eval mode, so that its compiled form may serve both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from types import FunctionType
from typing import Any

import torch

from moec.errors import MoecError
from moec.frontends.torch.effects import Watch
from moec.frontends.torch.lifted import Lifted
from moec.frontends.torch.reads import classes_of, names_in
from moec.verify import FP32_BAR, compare_results

# Of several kinds; dropout and noise show on the first.
_PROBES = 6


def differs_in_training(lifted: Lifted) -> str:
    """What a layer does in training mode that it may not do in eval mode; empty if the modes are one function.

    Code that asks for the mode is taken for code that differs: what it does may show on inputs that nobody probes, or
    in gradients only.
    """
    asking = _asking(lifted.module)
    if asking:
        return f"its code asks for the mode ({asking})"
    for probe in islice(lifted.probes(), _PROBES):
        try:
            with torch.no_grad():
                wanted = lifted.original(*probe.args, **probe.kwargs)
                with _training(lifted.module):
                    watch = Watch(lifted.module)
                    try:
                        found = lifted.original(*probe.args, **probe.kwargs)
                        changes = watch.changes()
                    finally:
                        watch.undo()
        except MoecError:
            raise
        except Exception as error:  # the user's code, in a mode it was not observed in
            return f"in training mode it raises {type(error).__name__}: {error}"
        if changes:
            return f"in training mode it {changes[0]}"
        result = compare_results(found, wanted)
        if result.mismatch or result.l2 > FP32_BAR:
            return "in training mode it computes something else"
    return ""


def _asking(module: torch.nn.Module) -> str:
    """A method that reads `training`, of the layer's own classes or torch's; empty if there is none."""
    for child in module.modules():
        if isinstance(child, torch.nn.modules.dropout._DropoutNd) and child.p == 0:
            continue
        for cls in classes_of([child]):
            for name, found in vars(cls).items():
                if isinstance(found, FunctionType) and "training" in names_in(found.__code__):
                    return f"{cls.__name__}.{name}"
    return ""


@contextmanager
def _training(module: torch.nn.Module) -> Iterator[Any]:
    """Every submodule in training mode, and afterwards in the mode it was in."""
    modes = [(m, m.training) for m in module.modules()]
    module.train()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode
