"""Values that depend on weights only: read where they lie, or computed once and held.

E experts, N outputs, C inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Never

import torch

from moec.backendbase import Weights
from moec.backends.reference.dtypes import DTYPES, described
from moec.backends.reference.joined import Experts, whole
from moec.backends.reference.products import quantize
from moec.errors import MoecError
from moec.ir import (
    BatchNorm,
    ConcatWeights,
    ExpertFfn,
    ExpertGlu,
    GroupedLinear,
    Norm,
    Op,
    QuantizeWeight,
    Region,
    SelectExperts,
    Tensor,
    Weight,
)
from moec.weights import LiveExperts, WeightStore, read_together

# Operands that are weights of experts, by op.
_PER_EXPERT: dict[type[Op], tuple[str, ...]] = {
    BatchNorm: ("mean", "var", "w", "b"),
    GroupedLinear: ("w", "b", "scale"),
    ExpertGlu: ("w", "b", "scale", "w_up", "b_up", "scale_up"),
    ExpertFfn: ("w_in", "w_out", "w_up", "b_in", "b_out", "b_up", "scale_in", "scale_out", "scale_up"),
    SelectExperts: ("w",),
}


def per_expert(region: Region) -> frozenset[str]:
    """Names of the values that are weights of experts: the first axis counts experts.

    Three sizes are always an expert's matrices; two may be a matrix or the biases of experts, which their use tells.
    """
    found = {value.name for node in region.nodes if node.op.of_weights for value in node.results if value.type.rank > 2}
    for node in reversed(region.nodes):
        op = node.op
        fields = _PER_EXPERT.get(type(op), ())
        if isinstance(op, Norm) and op.offsets is not None:
            fields = ("w", "b")
        if isinstance(op, ConcatWeights | QuantizeWeight) and any(value.name in found for value in node.results):
            fields = ("weights", "w")
        found.update(value.name for name, value in op.named_operands if name in fields)
    return frozenset(found)


class LiveWeight:
    """One weight of the region, read from the store on each use."""

    def __init__(self, store: Weights, op: Weight, *, of_experts: bool) -> None:
        self._store, self._ref, self._type = store, op.ref, op.type
        self._of_experts = of_experts
        self._dtype = DTYPES[op.type.dtype]
        self._shape = tuple(size.constant for size in op.type.shape)
        self._apart: CheckedExperts | None = None

    def check(self) -> None:
        """Raise MOEC405 unless the weight is there, and every expert's is as declared."""
        try:
            found = self.read()
        except KeyError:
            message = f'weight "{self._ref}" must be {self._type}, but there is none of this name'
            raise MoecError("MOEC405", message) from None
        if isinstance(found, CheckedExperts):
            for _ in found:
                pass

    def read(self) -> Experts:
        """The user's tensor now. Raises MOEC405 where it has another element type or shape than declared."""
        if not self._of_experts:
            return self._checked(self._store.dense(self._ref), self._shape)
        if self._apart is not None:
            return self._apart
        stacked = self._store.stacked(self._ref)
        if stacked is not None:
            return self._checked(stacked, self._shape)
        experts = self._store.experts(self._ref)
        if self._shape[0] not in (None, len(experts)):
            # Small weights of experts may be one tensor that nobody took apart.
            whole = self._store.dense(self._ref) if len(experts) == 1 else None
            return self._checked(whole, self._shape) if whole is not None else self._refuse(f"{len(experts)} experts")
        apart = CheckedExperts(self, experts)
        if isinstance(experts, LiveExperts):  # which reads anew each time, so it is good for all calls
            self._apart = apart
        return apart

    @property
    def ref(self) -> str:
        """The weight's name in the store."""
        return self._ref

    @property
    def is_dense(self) -> bool:
        """Whether it is one tensor, and none that is made of experts'."""
        return not self._of_experts

    def checked(self, found: torch.Tensor) -> torch.Tensor:
        """A dense weight that was read. Raises MOEC405 where it has another element type or shape than declared."""
        return self._checked(found, self._shape)

    def expert(self, experts: Sequence[torch.Tensor], index: int) -> torch.Tensor:
        """One expert's tensor, checked."""
        return self._checked(experts[index], self._shape[1:], f" for expert {index}")

    def _checked(self, found: torch.Tensor, shape: tuple[int | None, ...], where: str = "") -> torch.Tensor:
        if found.dtype == self._dtype and found.shape == shape:
            return found
        fits = found.dim() == len(shape) and all(b in (None, a) for a, b in zip(found.shape, shape, strict=True))
        return found if found.dtype == self._dtype and fits else self._refuse(described(found) + where)

    def _refuse(self, found: str) -> Never:
        message = f'weight "{self._ref}" must be {self._type}, found {found}'
        raise MoecError("MOEC405", message, hint="compile the model again after casting it")


class CheckedExperts(Sequence[torch.Tensor]):
    """E tensors of experts, each read and checked when it is asked for."""

    def __init__(self, weight: LiveWeight, experts: Sequence[torch.Tensor]) -> None:
        self._weight, self._experts = weight, experts

    def __len__(self) -> int:
        return len(self._experts)

    def __getitem__(self, index: int) -> torch.Tensor:  # type: ignore[override]
        return self._weight.expert(self._experts, index)

    @staticmethod
    def together(several: Sequence[CheckedExperts], experts: Sequence[int]) -> list[list[torch.Tensor]]:
        """For each of these experts its tensors of several weights, asked for in one go."""
        rows = read_together([weights._experts for weights in several], experts)
        if rows is None:
            return [[weights[e] for weights in several] for e in experts]
        dtypes = [weights._weight._dtype for weights in several]
        for e, row in zip(experts, rows, strict=True):
            for i, tensor in enumerate(row):
                if tensor.dtype is not dtypes[i]:  # shapes are the store's business
                    several[i]._weight._refuse(f"{described(tensor)} for expert {e}")
        return rows


class LiveWeights:
    """Some weights of a region by name, read from the store on each use: the dense ones together where it can."""

    def __init__(self, store: Weights, live: Mapping[str, LiveWeight]) -> None:
        together = isinstance(store, WeightStore)
        self._store = store
        self._dense = {name: one for name, one in live.items() if together and one.is_dense}
        self._others = {name: one for name, one in live.items() if name not in self._dense}
        self._refs = tuple(one.ref for one in self._dense.values())

    def read_into(self, values: dict[str, Experts]) -> None:
        """Put the user's tensors of now into `values`. Raises MOEC405 where one is not as declared."""
        if self._refs:
            assert isinstance(self._store, WeightStore)
            (found,) = self._store.read(self._refs, (0,))
            for (name, one), tensor in zip(self._dense.items(), found, strict=True):
                values[name] = one.checked(tensor)
        for name, one in self._others.items():
            values[name] = one.read()


def constant(value: float, type: Tensor, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """A tensor of this type and shape filled with the value."""
    return torch.full(shape, value, dtype=DTYPES[type.dtype], device=device)


def quantize_weight(w: Experts, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """w[..., N, C] -> i8[..., N, C], scale f32[..., N]; one matrix at a time, so that no fp32 copy of all exists."""
    if rank == 2:
        return quantize(whole(w))
    first, first_scale = quantize_weight(w[0], rank - 1)
    q = first.new_empty(len(w), *first.shape)
    scale = first_scale.new_empty(len(w), *first_scale.shape)
    q[0], scale[0] = first, first_scale
    for e in range(1, len(w)):
        q[e], scale[e] = quantize_weight(w[e], rank - 1)
    return q, scale
