"""The operands of a fused op as the ways to run it see them.

T tokens, K experts per token, E experts, N outputs, C inputs, D model width, F expert width, O output width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch

from moec.backends.cpu.activation import FastActivation
from moec.backends.reference.frame import Frame
from moec.backends.reference.joined import Experts, Joined
from moec.backends.reference.weights import CheckedExperts
from moec.ir import DTYPES, DenseFfn, ExpertFfn, Value

Row = Sequence[Any]
"""One expert's w and b of the first product, of up, and of the second: tensors, or None."""


class Product(NamedTuple):
    """One product's weights: w[E, N, C], b[E, N]?, and scale[E, N]? of i8 weights. Read only for hit experts."""

    w: Experts
    b: Experts | None = None
    scale: Experts | None = None

    @property
    def stack(self) -> torch.Tensor | None:
        """All experts as one tensor, where they lie so."""
        return self.w if isinstance(self.w, torch.Tensor) else None

    @property
    def matrices(self) -> torch.Tensor:
        """`stack`, for ways that are chosen only where there is one."""
        assert isinstance(self.w, torch.Tensor), "this way needs weights that are one tensor"
        return self.w


@dataclass(frozen=True, slots=True)
class Sizes:
    """What never changes about an op: its sizes, and how its experts weigh in."""

    num_experts: int
    width: int
    """F."""
    width_in: int
    """Columns of all first products together: F, or 2F with a gate."""
    width_out: int
    """O, usually D."""
    elements: int
    """Of one expert's matrices together."""
    expert_bytes: int
    """Of one expert's matrices together."""
    matrix_bytes: int
    """Of the largest matrix."""
    inputs: int
    """Of the longest sum."""
    alike: bool
    """Whether x, weights and biases are all of one type, so that torch's own linear takes them."""

    @classmethod
    def of(cls, op: ExpertFfn | DenseFfn) -> Sizes:
        """The sizes of an op; a dense_ffn is one expert."""
        matrices = [w for w in (op.w_in, op.w_out, op.w_up) if w is not None]
        shapes = [tuple(_number(w, axis) for axis in range(w.type.rank))[-2:] for w in matrices]
        nbytes = [prod(shape) * DTYPES[w.type.dtype] for w, shape in zip(matrices, shapes, strict=True)]
        gated = op.layout != "none"
        width = shapes[1][1]
        return cls(
            num_experts=_number(op.w_in, 0) if op.w_in.type.rank == 3 else 1,
            width=width,
            width_in=2 * width if gated else width,
            width_out=shapes[1][0],
            elements=sum(map(prod, shapes)),
            expert_bytes=sum(nbytes),
            matrix_bytes=max(nbytes),
            inputs=max(inputs for _, inputs in shapes),
            alike=all(v is None or v.type.dtype == op.x.type.dtype for v in (*matrices, op.b_in, op.b_out, op.b_up)),
        )


def _number(value: Value, axis: int) -> int:
    size = value.type.shape[axis].constant
    assert size is not None, f"{value}: sizes of weights are numbers"
    return size


class Layer(NamedTuple):
    """An expert_ffn over live weights: what one call needs besides tokens."""

    first: Product
    up: Product | None
    second: Product
    activation: FastActivation
    sizes: Sizes

    @property
    def products(self) -> dict[str, Product]:
        """All products by name."""
        named = {"first": self.first, "second": self.second}
        return named if self.up is None else {**named, "up": self.up}

    @property
    def products_in(self) -> tuple[Product, ...]:
        """The one or two products before the activation."""
        return (self.first,) if self.up is None else (self.first, self.up)

    @property
    def stacked(self) -> bool:
        """Whether each product's weights are one tensor of floating point numbers, which several at once need."""
        return all(
            p is None or (isinstance(p.w, torch.Tensor) and p.scale is None) for p in (self.first, self.up, self.second)
        )

    def rows(self, experts: Sequence[int]) -> Sequence[Row]:
        """The weights of these experts as they are now; those that are a tensor each are asked for together."""
        up = (None, None) if self.up is None else self.up[:2]
        parts = (*self.first[:2], *up, *self.second[:2])
        apart = [part for part in parts if isinstance(part, CheckedExperts)]
        others = [(at, part) for at, part in enumerate(parts) if not isinstance(part, CheckedExperts)]
        read: list[list[Any]] = CheckedExperts.together(apart, experts) if apart else [[] for _ in experts]
        for e, row in zip(experts, read, strict=True):
            for at, part in others:
                row.insert(at, None if part is None else part[e])
        return read


def expert_layer(op: ExpertFfn, activation: FastActivation, sizes: Sizes, at: Frame) -> Layer:
    """The weights of an expert_ffn as they are now."""
    first = Product(at.experts(op.w_in), at.maybe_experts(op.b_in), at.maybe_experts(op.scale_in))
    second = Product(at.experts(op.w_out), at.maybe_experts(op.b_out), at.maybe_experts(op.scale_out))
    up = None
    if op.w_up is not None:
        up = Product(at.experts(op.w_up), at.maybe_experts(op.b_up), at.maybe_experts(op.scale_up))
    else:
        first, up = _take_apart(first, op.layout)
    return Layer(first, up, second, activation, sizes)


def dense_layer(op: DenseFfn, activation: FastActivation, sizes: Sizes, at: Frame) -> Layer:
    """The weights of a dense_ffn as they are now, as those of one expert."""

    def product(w: Value, b: Value | None, scale: Value | None) -> Product:
        return Product(_one(at, w), *(None if value is None else _one(at, value) for value in (b, scale)))

    first, second = product(op.w_in, op.b_in, op.scale_in), product(op.w_out, op.b_out, op.scale_out)
    up = None
    if op.w_up is not None:
        up = product(op.w_up, op.b_up, op.scale_up)
    else:
        first, up = _take_apart(first, op.layout)
    return Layer(first, up, second, activation, sizes)


def _one(at: Frame, value: Value) -> Experts:
    """A dense weight as that of one expert; joined weights stay apart."""
    found = at.experts(value)
    if isinstance(found, Joined):
        return Joined([_unsqueezed(part) for part in found.parts], found.axis + 1)
    return (found,) if isinstance(found, torch.Tensor) else _unsqueezed(found)


def _unsqueezed(weight: Experts) -> torch.Tensor:
    return (weight if isinstance(weight, torch.Tensor) else torch.stack(list(weight))).unsqueeze(0)


def _take_apart(first: Product, layout: str) -> tuple[Product, Product | None]:
    """Gate and up as two products where they are joined weights that were left where they lie."""
    if not isinstance(first.w, Joined):
        return first, None
    gates, ups = [], []
    for parts in first:
        pieces: Sequence[Experts | None] = (None, None)
        if parts is not None:
            halves = isinstance(parts, Joined) and parts.axis == 1 and len(parts.parts) == 2
            if not (isinstance(parts, Joined) and halves and len(parts.parts[0][0]) == len(parts.parts[1][0])):
                return first, None
            pieces = parts.parts
        gates.append(pieces[0])
        ups.append(pieces[1])
    if layout == "concat_up_first":
        gates, ups = ups, gates
    elif layout != "concat":
        return first, None
    assert gates[0] is not None
    assert ups[0] is not None
    return Product(gates[0], *gates[1:]), Product(ups[0], *ups[1:])


def bias_rows(b: Experts, experts: list[int], counts: list[int], dtype: torch.dtype) -> torch.Tensor:
    """b[E, N] -> [sum(counts), N]: the bias of each row, when expert experts[i] has counts[i] rows in a row."""
    picked = torch.stack([b[e] for e in experts]).to(dtype)
    return picked.repeat_interleave(torch.tensor(counts, device="cpu"), 0, output_size=sum(counts))
