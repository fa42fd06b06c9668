"""Compile the kernels of gradients ahead of time for the GPU named on the command line, in a process of its own."""

from __future__ import annotations

import sys
from typing import Any

import torch

from moec.backends.triton.choose import TILES, Plan, Tile
from moec.backends.triton.gradients import TrainRun, Wanted
from moec.backends.triton.launch import Launch
from moec.backends.triton.operands import Operands
from moec.backends.triton.site import Site
from moec.backends.triton.spec import layer_of
from tests.backends.cpu.layers import Case, inputs, make
from tests.backends.triton.kernels.ahead import GPUS, compile_ahead

CPU = torch.device("cpu")
LAYERS: tuple[tuple[torch.dtype, int, dict[str, Any]], ...] = (
    (torch.bfloat16, 128, {}),
    (torch.bfloat16, 16, {"layout": "interleaved", "bias": True, "alpha": 1.702, "limit": 7.0, "up_shift": 1.0}),
    (torch.float16, 64, {"layout": "none", "fn": "gelu_tanh", "turned": True}),
    (torch.float32, 64, {"listed": True, "layout": "pair"}),
)


def step(run: TrainRun, case: Case) -> None:
    """All launches of a step; gradients go to where the weights are."""
    x, ids, weights = inputs(case, run.tokens, 2)
    y, saved = run.forward(x, ids, weights)
    bias = run.layer.gate.b is not None
    wanted = Wanted(x=True, weights=True, w_in=True, w_out=True, b_in=bias, b_out=bias)
    run.backward(torch.empty_like(y), x, ids, weights, saved, lambda first: run.layer, wanted)


def main(capability: int) -> None:
    """Compile, and print the names of the kernels."""
    done: set[str] = set()

    def compiled(self: Launch, stream: int, grid: Any, *args: Any) -> None:
        del stream, grid
        compile_ahead(self, args, capability)
        done.add(self.kernel.__name__)

    Launch.__call__ = compiled  # type: ignore[method-assign]
    for dtype, rows, layout in LAYERS:
        case = make(8, 64, 48, dtype=dtype, **layout)
        layer = layer_of(case.op, Operands(**case.weights), CPU)
        steps = 128 // dtype.itemsize
        plan = Plan(TILES, Tile(rows, 32, steps, 4, 2), Tile(rows, 64, 32, 4, 2))
        step(TrainRun(Site(layer, GPUS[capability], 2, True, False, "ieee", {}), plan, 40), case)
    print(" ".join(sorted(done)))


if __name__ == "__main__":
    main(int(sys.argv[1]))
