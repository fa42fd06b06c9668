"""The values of one run of a region, and the sizes that the inputs bind."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch

from moec.backendbase import OpaqueGraph
from moec.backends.reference.joined import Experts, shape_of, whole
from moec.ir import Dim, Value, bind_sizes


class Frame:
    """Values by name. A value is a tensor, or for weights of experts possibly a list of E tensors."""

    def __init__(
        self,
        values: dict[str, Experts],
        opaques: Mapping[str, OpaqueGraph],
        sizes: Mapping[str, int],
    ) -> None:
        self.values, self.opaques = values, opaques
        self._sizes = dict(sizes)

    def tensor(self, value: Value) -> torch.Tensor:
        """The value as one tensor; a copy where weights of experts lie apart."""
        return whole(self.values[value.name])

    def maybe(self, value: Value | None) -> torch.Tensor | None:
        """The tensor of an operand that may be absent."""
        return None if value is None else self.tensor(value)

    def experts(self, value: Value) -> Experts:
        """Weights of experts, [E, ...] or E tensors."""
        return self.values[value.name]

    def maybe_experts(self, value: Value | None) -> Experts | None:
        """Weights of experts that may be absent."""
        return None if value is None else self.experts(value)

    def size(self, dim: Dim) -> int:
        """A size for the tensors of this run."""
        return dim.evaluate(self._sizes)

    def bind(self, found: Mapping[Value, Experts]) -> None:
        """Read off letters that no input has, and check the others. Raises MOEC109 where sizes disagree."""
        known = [Value(value.name, value.type.substitute(self._sizes)) for value in found]
        self._sizes |= bind_sizes(known, [shape_of(experts) for experts in found.values()])

    @cached_property
    def device(self) -> torch.device:
        """Where the run happens: the device of the first tensor, the CPU if there is none."""
        found = list(self.values.values())
        for x in found:
            if isinstance(x, torch.Tensor):
                return x.device
        # Weights of experts that are a tensor each are looked at last: reading one may be work.
        return next((_first(x).device for x in found if len(x)), torch.device("cpu"))


def _first(experts: Experts) -> torch.Tensor:
    return experts if isinstance(experts, torch.Tensor) else _first(experts[0])
