"""What the launches of one call share, and how operands become their arguments.

E experts, N outputs, C inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import triton.language as tl

from moec.backends.triton.gpu import GpuFacts
from moec.backends.triton.launch import Fixed, Launch
from moec.backends.triton.operands import Product, Stored
from moec.backends.triton.spec import Layer

TYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.int8: tl.int8,
}


class Run(Protocol):
    """One plan for one number of tokens; ids is None for one expert that takes every row."""

    def __call__(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor | None,
        valid: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class Site:
    """What the launches of one call share."""

    layer: Layer
    facts: GpuFacts
    k: int
    weighted: bool
    has_valid: bool
    precision: str
    """Of products: ieee or tf32, or wide in the interpreter."""
    made: dict[Any, Launch]
    """Launches by all that tells them apart, so that numbers of tokens share compiled kernels."""

    @property
    def pdl(self) -> bool:
        """Whether a kernel may start before the one it follows has ended."""
        return self.facts.hopper and not self.facts.interpreted

    def launch(
        self,
        kernel: Any,
        constants: dict[str, Any],
        *,
        warps: int = 4,
        stages: int = 1,
        pdl: bool,
        scratch: bool = False,
    ) -> Launch:
        """The launch of a kernel with these constants, made once."""
        key = (kernel.__name__, tuple(constants.items()), warps, stages, pdl, scratch)
        if key not in self.made:
            self.made[key] = Launch(kernel, constants, warps=warps, stages=stages, pdl=pdl, scratch=scratch)
        return self.made[key]


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def matrix(w: Stored) -> dict[str, Any]:
    """The constants of a product's weights."""
    return {
        "W_E": w.stride,
        "W_N": w.strides[0],
        "W_C": w.strides[1],
        "LISTED": w.listed,
        "W_DTYPE": TYPES[w.dtype],
    }


def vector(v: Stored | None, letter: str) -> dict[str, Any]:
    """The constants of a bias (letter B) or of scales (S)."""
    names = [f"{letter}_{part}" for part in ("E", "N", "LISTED", "DTYPE")]
    values = (0, 0, 0, tl.float32) if v is None else (v.stride, v.strides[0], v.listed, TYPES[v.dtype])
    return dict(zip(names, values, strict=True))


def base(part: Stored | None) -> Fixed | None:
    """What a kernel gets for a part that may be absent."""
    return None if part is None else Fixed.at(part.base)


def vectors(product: Product) -> tuple[dict[str, Any], dict[str, Any]]:
    """The constants of a product's bias and scales, and the flags that say which there are."""
    return vector(product.b, "B") | vector(product.scale, "S"), {
        "HAS_BIAS": product.b is not None,
        "HAS_SCALE": product.scale is not None,
    }
