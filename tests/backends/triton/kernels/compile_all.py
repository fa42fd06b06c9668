"""Compile every kernel ahead of time for the GPUs named on the command line, in a process of its own.

The interpreter replaces kernels when they are defined, so a process that tests with it cannot compile.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from moec.backends.triton.choose import GEMV, PERSISTENT, TILES, Plan, Rows, Tile
from moec.backends.triton.gpu import GpuFacts
from moec.backends.triton.kernels.route import Router
from moec.backends.triton.launch import Launch
from moec.backends.triton.operands import Operands
from moec.backends.triton.prepare import Prepared
from moec.backends.triton.spec import layer_of
from moec.ir import Builder, Route, Tensor
from tests.backends.cpu.layers import inputs, make
from tests.backends.triton.kernels.ahead import GPUS, compile_ahead

CPU = torch.device("cpu")
LAYOUTS: tuple[dict[str, Any], ...] = (
    {},
    {"layout": "interleaved", "listed": True, "bias": True, "alpha": 1.702, "limit": 7.0, "up_shift": 1.0},
    {"layout": "none", "fn": "gelu_tanh", "turned": True},
)


def plans(prepared: Prepared, gpu: GpuFacts) -> list[Plan]:
    """One plan of each path that this GPU can run."""
    rows = Plan(GEMV, Rows(4, 512), Rows(4, 512))
    tiles = Plan(TILES, Tile(16, 32, 64, 4, 3), Tile(16, 64, 64, 4, 3))
    persistent = Plan(PERSISTENT, Tile(128, 64, 64, 8, 3), Tile(128, 128, 64, 8, 3, flatten=True))
    hopper = gpu.hopper and prepared.shape.tma and prepared.layer.dtype.itemsize == 2
    return [rows, tiles, persistent] if hopper else [rows, tiles]


def main(capabilities: list[int]) -> None:
    """Compile and print one line for each compute capability."""
    for capability in capabilities:
        done: set[str] = set()

        def compiled(self: Launch, stream: int, grid: Any, *args: Any) -> None:
            del stream, grid
            name = self.kernel.__name__
            compile_ahead(self, args, capability)  # noqa: B023
            done.add(name)  # noqa: B023

        Launch.__call__ = compiled  # type: ignore[method-assign]
        for i, layout in enumerate(LAYOUTS):
            case = make(8, 64, 48, dtype=(torch.bfloat16, torch.float16, torch.float32)[i % 3], **layout)
            gpu = GPUS[capability]
            prepared = Prepared(layer_of(case.op, Operands(**case.weights), CPU), gpu, CPU)
            for plan in plans(prepared, gpu):
                for tokens, k in ((40, 2), (40, 1)) + (((2100, 2),) if i == 0 and plan.path == TILES else ()):
                    prepared(*inputs(case, tokens, k), plan=plan)
        b = Builder("layer")
        Router(Route(b.input("logits", Tensor.of("f32", "T", 128)), k=8))(torch.zeros(4, 128))
        print(capability, " ".join(sorted(done)))


if __name__ == "__main__":
    main([int(arg) for arg in sys.argv[1:]])
