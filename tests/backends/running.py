"""Ops and regions run through the reference back end. T tokens, K choices, E experts, N outputs, C inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from moec.backendbase import Executable, load_backend
from moec.ir import Builder, Op, Region, Tensor, Value
from moec.weights import View, WeightStore

DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i8": torch.int8,
    "i32": torch.int32,
    "i64": torch.int64,
    "bool": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = ("f64", "f32", "f16", "bf16")
Operand = torch.Tensor | tuple[torch.Tensor, ...] | None
Opaques = Mapping[str, Callable[..., tuple[torch.Tensor, ...]]]


def type_of(tensor: torch.Tensor) -> Tensor:
    """The tensor's type with its sizes as numbers."""
    return Tensor.of(NAMES[tensor.dtype], *tensor.shape)


def single(
    cls: type[Op],
    operands: Mapping[str, Operand],
    *,
    types: Mapping[str, Tensor] | None = None,
    **attributes: Any,
) -> tuple[Region, list[torch.Tensor]]:
    """A region of one op whose operands are all inputs, and the inputs. `types` replaces types of inputs by name."""
    b = Builder("single")
    inputs: list[torch.Tensor] = []

    def declare(name: str, tensor: torch.Tensor) -> Value:
        inputs.append(tensor)
        return b.input(name, (types or {}).get(name) or type_of(tensor))

    values: dict[str, Any] = {}
    for name, operand in operands.items():
        if isinstance(operand, tuple):
            values[name] = tuple(declare(f"{name}{number}", tensor) for number, tensor in enumerate(operand))
        elif operand is not None:
            values[name] = declare(name, operand)
    op = cls(**values, **attributes)
    return b.build(*b.add_many(op, [f"result{number}" for number in range(len(op.result_types()))])), inputs


def evaluate(
    cls: type[Op], operands: Mapping[str, Operand], *, opaques: Opaques | None = None, **attributes: Any
) -> tuple[torch.Tensor, ...]:
    """What one op makes of these operands."""
    region, inputs = single(cls, operands, **attributes)
    return execute(region, inputs, opaques=opaques)


def evaluate_one(cls: type[Op], operands: Mapping[str, Operand], **attributes: Any) -> torch.Tensor:
    """The result of an op that has one."""
    (result,) = evaluate(cls, operands, **attributes)
    return result


def execute(
    region: Region, inputs: list[torch.Tensor], *, opaques: Opaques | None = None, weights: Weights | None = None
) -> tuple[torch.Tensor, ...]:
    """Build the region and run it once."""
    return build(region, weights or Weights(), opaques=opaques)(*inputs)


def build(region: Region, weights: Weights, *, opaques: Opaques | None = None, pack: bool = False) -> Executable:
    """The region over these weights."""
    return load_backend("reference").build(region, weights.store(), dict(opaques or {}), pack=pack)


class Weights:
    """Parameters of one module and the views of them that a region's references name."""

    def __init__(self) -> None:
        self.module = nn.Module()
        self.views: dict[str, View | tuple[View, ...]] = {}
        self.params: dict[str, nn.Parameter] = {}

    def dense(self, ref: str, tensor: torch.Tensor) -> Weights:
        """One tensor that is not per expert."""
        self._register(ref, tensor)
        self.views[ref] = View(ref, 0, tuple(tensor.shape), tuple(tensor.stride()))
        return self

    def stacked(self, ref: str, tensor: torch.Tensor) -> Weights:
        """[E, ...] in one parameter with whatever strides the tensor has."""
        self._register(ref, tensor)
        shape, stride, step = tuple(tensor.shape[1:]), tuple(tensor.stride()[1:]), tensor.stride(0)
        self.views[ref] = tuple(View(ref, e * step, shape, stride) for e in range(tensor.shape[0]))
        return self

    def separate(self, ref: str, tensor: torch.Tensor) -> Weights:
        """[E, ...] as one parameter for each expert."""
        views = []
        for e, one in enumerate(tensor):
            name = f"{ref}_{e}"
            self._register(name, one)
            views.append(View(name, 0, tuple(one.shape), tuple(self.params[name].stride())))
        self.views[ref] = tuple(views)
        return self

    def store(self) -> WeightStore:
        """The store a back end reads from."""
        return WeightStore(self.module, self.views)

    def _register(self, name: str, tensor: torch.Tensor) -> None:
        # clone keeps dense strides, so that a transposed weight stays one.
        self.params[name] = nn.Parameter(tensor.clone(), requires_grad=False)
        self.module.register_parameter(name, self.params[name])
