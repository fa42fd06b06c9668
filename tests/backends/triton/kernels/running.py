"""Layers run by the kernels: on a GPU where there is one, else by Triton's interpreter on the CPU.

T tokens, K experts per token, E experts.
"""

from __future__ import annotations

import os
from typing import Any

import torch

if not torch.cuda.is_available():
    # Read when kernels are defined, so before they are imported.
    os.environ["TRITON_INTERPRET"] = "1"

from moec.backends.reference.joined import Experts
from moec.backends.triton.choose import GEMV, PERSISTENT, TILES, Plan, Rows, Tile
from moec.backends.triton.operands import Operands
from moec.backends.triton.prepare import Prepared, prepare
from tests.backends.cpu.layers import Case, error, make

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
PATHS = (GEMV, TILES, PERSISTENT)
BARS = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def plan_for(path: str) -> Plan:
    """Small tiles, so that small layers have several."""
    if path == GEMV:
        return Plan(GEMV, Rows(16, 32), Rows(16, 32), "test")
    if path == TILES:
        return Plan(TILES, Tile(16, 16, 16, 4, 2), Tile(16, 32, 16, 4, 2), "test")
    rows = 64 if DEVICE.type == "cuda" else 16
    return Plan(PERSISTENT, Tile(rows, 16, 32, 4, 2), Tile(rows, 32, 32, 4, 2), "test")


def on_device(weights: Experts) -> Experts:
    """Weights where kernels read them."""
    return weights.to(DEVICE) if isinstance(weights, torch.Tensor) else [w.to(DEVICE) for w in weights]


def ready(case: Case) -> Prepared:
    """The case's kernels."""
    case.weights = {name: on_device(w) for name, w in case.weights.items()}
    return prepare(case.op, Operands(**case.weights), DEVICE)


def can(prepared: Prepared, path: str) -> bool:
    """Whether the path can run this layer."""
    sixteen_bits = prepared.layer.dtype.itemsize == 2 and prepared.shape.weights == prepared.shape.dtype
    return path != PERSISTENT or (prepared.shape.tma and sixteen_bits and prepared.facts.hopper)


def run(prepared: Prepared, path: str | None, *given: Any, **more: Any) -> torch.Tensor:
    """The result of a path, in a buffer that held not-a-numbers."""
    given = tuple(None if x is None else x.to(DEVICE) for x in given)
    out = torch.full((given[0].shape[0], prepared.layer.o), float("nan"), dtype=given[0].dtype, device=DEVICE)
    found = prepared(*given, out=out, plan=None if path is None else plan_for(path), **more)
    assert found is out
    return out.cpu()


def meaning(case: Case, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The op by its meaning, on the CPU."""
    weights_of: dict[str, Experts] = {
        name: w.cpu() if isinstance(w, torch.Tensor) else [part.cpu() for part in w] for name, w in case.weights.items()
    }
    kept, case.weights = case.weights, weights_of
    try:
        return case.meaning(x, ids, weights)
    finally:
        case.weights = kept


def assert_right(case: Case, prepared: Prepared, path: str | None, *given: torch.Tensor) -> torch.Tensor:
    """The path's result, which is close to the meaning's."""
    found = run(prepared, path, *given)
    gap = error(found, meaning(case, *given))
    assert gap <= BARS[case.dtype], f"{path}: error {gap:.1e}"
    return found


__all__ = ["BARS", "DEVICE", "PATHS", "Case", "assert_right", "can", "make", "meaning", "plan_for", "ready", "run"]
