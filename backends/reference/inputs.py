"""What a call hands in: counted, and checked against the types that the region's inputs have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from moec.backends.reference.dtypes import DTYPES, described
from moec.errors import MoecError, count
from moec.ir import Region, bind_sizes
from moec.ir.types import INDICES

# Sizes are the same for the same shapes; a server sees few of them, and a loop over lengths must not fill memory.
MOST_SHAPES = 256


class Inputs:
    """The inputs of one region."""

    def __init__(self, region: Region) -> None:
        self._region = region
        self.names = tuple(value.name for value in region.inputs)
        both = tuple(DTYPES[name] for name in INDICES)
        self._dtypes = tuple(
            both if value.type.dtype in INDICES else (DTYPES[value.type.dtype],) for value in region.inputs
        )
        self._sizes: dict[tuple[torch.Size, ...], Mapping[str, int]] = {}

    def check(self, inputs: Sequence[object]) -> Mapping[str, int]:
        """The size of each letter. Indices may be i32 or i64, all else must be as declared.

        Raises MOEC404 for a wrong number of inputs, something that is no tensor, another element type, or tensors on
        different devices; MOEC109 for shapes that do not fit.
        """
        if len(inputs) != len(self.names):
            listed = ", ".join(f"{value}: {value.type}" for value in self._region.inputs)
            raise self._error(f"takes {count(len(self.names), 'input')} ({listed}), found {len(inputs)}")
        tensors: list[torch.Tensor] = []
        for value, tensor, dtypes in zip(self._region.inputs, inputs, self._dtypes, strict=True):
            if not isinstance(tensor, torch.Tensor):
                raise self._error(f"{value} must be a tensor {value.type}, found {type(tensor).__name__}")
            if tensor.dtype not in dtypes:
                raise self._error(f"{value} must be {value.type}, found {described(tensor)}")
            tensors.append(tensor)
            if tensor.device != tensors[0].device:
                devices = f"{tensors[0].device} and {tensor.device}"
                raise self._error(f"{self._region.inputs[0]} and {value} are on {devices}")
        shapes = tuple(tensor.shape for tensor in tensors)
        sizes = self._sizes.get(shapes)
        return self._bind(shapes) if sizes is None else sizes

    def _bind(self, shapes: tuple[torch.Size, ...]) -> Mapping[str, int]:
        try:
            sizes = bind_sizes(self._region.inputs, shapes)
        except MoecError as error:
            raise error.located(f"region {self._region.name}") from None
        if len(self._sizes) >= MOST_SHAPES:
            self._sizes.clear()
        self._sizes[shapes] = sizes
        return sizes

    def _error(self, message: str) -> MoecError:
        return MoecError("MOEC404", message, where=f"region {self._region.name}")
