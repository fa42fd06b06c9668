"""Inputs for timing a model when nobody gave any: token ids for transformers, else x[1, T, D] as wide as its layers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from moec.errors import MoecError
from moec.ir import parse
from moec.loading import Inputs, MakeInputs, token_inputs
from moec.report import Report


def guess_inputs(model: nn.Module, report: Report) -> MakeInputs | None:
    """tokens -> inputs that the model takes; None if neither token ids nor a tensor as wide as a layer will do."""
    return token_inputs(model) or tensor_inputs(model, report)


def tensor_inputs(model: nn.Module, report: Report) -> MakeInputs | None:
    """x[1, T, D], or x[T, D], of the first width among the layers' that the model runs with."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return None
    for width in _widths(report):
        for lead in ((1,), ()):
            make = _random_rows(lead, width, like=parameter)
            if _runs(model, make(2)):
                return make
    return None


def _random_rows(lead: tuple[int, ...], width: int, *, like: torch.Tensor) -> MakeInputs:
    """tokens -> x[*lead, tokens, width], the same for the same number of tokens."""

    def make(tokens: int) -> tuple[torch.Tensor]:
        generator = torch.Generator().manual_seed(tokens)
        return (torch.randn(*lead, tokens, width, generator=generator).to(like.device, like.dtype),)

    return make


def _widths(report: Report) -> Iterator[int]:
    """The distinct widths D of the x[T, D] that the layers' programs take, in the order of the layers."""
    seen = set()
    for layer in report.compiled:
        try:
            x = parse(layer.ir_before).inputs[0]
        except (MoecError, IndexError):
            continue
        width = x.type.shape[-1].constant
        if width is not None and width not in seen:
            seen.add(width)
            yield width


@torch.no_grad()
def _runs(model: nn.Module, inputs: Inputs) -> bool:
    try:
        model(*inputs)
    except Exception:  # whatever the user's module raises, these are not its inputs
        return False
    return True
