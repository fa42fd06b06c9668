"""A torch model as it will be exported: on the CPU, in the types that its file will have."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

from moec.errors import MoecError
from moec.frontends.torch.twin import make_twin
from moec.trees import tree_map

Example = tuple[tuple[Any, ...], dict[str, Any]]
LOW = (torch.float16, torch.bfloat16)
FLOATS = (*LOW, torch.float32, torch.float64)
# Devices without values, and those whose values torch does not hand over.
NOWHERE = ("meta", "xla")


@dataclass(frozen=True)
class Prepared:
    """The model and its arguments; `wide` is the model in fp32, where it computes in 16 bits."""

    model: nn.Module
    example: Example
    wide: nn.Module | None
    notes: tuple[str, ...]


def prepare(model: nn.Module, example: Example, target: str) -> Prepared:
    """What is exported and checked in the model's place; the model itself is left alone.

    A model elsewhere is copied to the CPU. ONNX Runtime's CPU provider does not compute in bf16: models in bf16 are
    written in fp32, but for "cuda". Raises MOEC503 for what cannot be copied or checked.
    """
    _check_kind(model)
    notes = []
    places = {str(tensor.device) for tensor in _tensors(model)} - {"cpu"}
    if places:
        model, example = make_twin(model, _to_cpu), tree_map(_to_cpu, example)
        notes.append(f"copied from {', '.join(sorted(places))}, checked and timed on the CPU")
    low = {tensor.dtype for tensor in _tensors(model)} & set(LOW)
    if not low:
        return Prepared(model, example, None, tuple(notes))
    wide = make_twin(model, widened)
    if torch.bfloat16 in low and target != "cuda":
        notes.append(
            "written, checked and timed in fp32: the model is in bf16, in which ONNX Runtime's CPU provider does not "
            "compute; model.half() is written in fp16"
        )
        return Prepared(wide, tree_map(widened, example), None, tuple(notes))
    return Prepared(model, example, wide, tuple(notes))


def widened(value: Any) -> Any:
    """A tensor of 16 bits in fp32; anything else as it is."""
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in LOW else value


def _to_cpu(value: Any) -> Any:
    return value.to("cpu") if isinstance(value, torch.Tensor) else value


def _tensors(model: nn.Module) -> chain[torch.Tensor]:
    return chain(model.parameters(), model.buffers())


def _check_kind(model: nn.Module) -> None:
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.device.type in NOWHERE:
            hint = "load the weights before exporting"
            raise MoecError("MOEC503", f"{name} is on {tensor.device}, where it has no values", hint=hint)
        if tensor.is_floating_point() and tensor.dtype not in FLOATS:
            what = f"models in {tensor.dtype} are not exported: {name}"
            raise MoecError("MOEC503", what, hint='export model.float(), with quantize="int8" where bytes matter')
