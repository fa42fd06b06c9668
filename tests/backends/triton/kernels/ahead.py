"""Kernels compiled for a GPU that need not be there, exactly as `Prepared` would launch them."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from moec.backends.triton.gpu import GpuFacts
from moec.backends.triton.launch import Fixed, Launch

NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
}
GPUS = {
    80: GpuFacts("A100", (8, 0), 108, 40 << 20, 163 << 10),
    89: GpuFacts("L40S", (8, 9), 142, 96 << 20, 99 << 10),
    90: GpuFacts("H100", (9, 0), 132, 50 << 20, 227 << 10),
}


def source_of(launch: Launch, args: tuple[Any, ...]) -> ASTSource:
    """What the first launch with these arguments compiles."""
    kernel = launch.kernel
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    args = tuple(arg.tensor if isinstance(arg, Fixed) else arg for arg in args)
    for i, (param, value) in enumerate(zip(kernel.params, (*args, *launch.constants.values()), strict=True)):
        if param.is_constexpr or value is None:
            signature[param.name] = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, TensorDescriptor):
            signature[param.name] = f"tensordesc<{NAMES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, torch.Tensor):
            signature[param.name] = f"*{NAMES[value.dtype]}"
            if not param.do_not_specialize_on_alignment:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = "i32"
    return ASTSource(kernel, signature, constants, attributes)


def compile_ahead(launch: Launch, args: tuple[Any, ...], capability: int) -> Any:
    """The compiled kernel for this compute capability."""
    return triton.compile(
        source_of(launch, args), target=GPUTarget("cuda", capability, 32), options=dict(launch.options)
    )
