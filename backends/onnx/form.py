"""How a region is written: which ops stand for its experts, and how its products are taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Experts = Literal["sorted", "moe", "qmoe"]
"""Rows sorted by expert and a product for each in ONNX's own ops, or one node of ONNX Runtime's MoE or QMoE."""

Products = Literal["exact", "integer", "integer_to_float", "blocks"]
"""How the products of sorted rows are taken.

"exact": in floating point; i8 weights are widened first, which is what the ops mean. "integer": i8 weights times rows
rounded to int8, by MatMulInteger. "integer_to_float": the same by ONNX Runtime's MatMulIntegerToFloat, with fewer
passes over the rows. "blocks": weights in blocks with a scale each, rows rounded so too, by its MatMulNBits.
"""


@dataclass(frozen=True)
class Form:
    """One way to write a region."""

    experts: Experts = "sorted"
    products: Products = "exact"
    chained: bool = False
    """Of sorted rows: each expert's products stand one behind the other, instead of all experts' side by side."""
    bits: int = 8
    """Of a weight, where this form itself rounds weights: "qmoe" and "blocks"."""
    block: int = 128
    """How many weights of a row share a scale there."""
    cuda: bool = False
    """Says that QMoE's weights lie as they are, which the CUDA provider does not assume."""
    half: bool = False
    """MoE and QMoE compute in fp16, around which other types are cast."""
    router: bool = False
    """MoE and QMoE are handed the logits of the softmax router in front of them and choose experts themselves."""

    @property
    def rounds_weights(self) -> bool:
        """Whether it takes exact weights and writes them rounded."""
        return self.experts == "qmoe" or self.products == "blocks"

    @property
    def contrib(self) -> bool:
        """Whether it needs ops that only ONNX Runtime has."""
        return self.experts != "sorted" or self.products in ("integer_to_float", "blocks")


EXACT = Form()
INTEGER = Form(products="integer")
