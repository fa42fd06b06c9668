"""Experts that are modules of their own: all tensors of one expert, asked for together.

Lists of small experts are read on each call. Asked one tensor at a time, that takes longer than their products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from moec.homes import Home, Layout

if TYPE_CHECKING:
    import torch


class Branch:
    """What the tensors of one expert hang on, each module on the way to several of them asked once."""

    def __init__(self, homes: Iterable[Home], layouts: Iterable[Layout], checks: Iterable[Callable[[], None]]) -> None:
        homes = list(homes)
        steps = {(id(table), key): (table, key, child) for home in homes for table, key, child in home.steps}
        self._steps = tuple((table, key, child, child.__dict__) for table, key, child in steps.values())
        self._sizes = tuple({id(table): (table, size) for home in homes for table, size in home.sizes}.values())
        absent = {(id(home.owner), name): (home.owner, name) for home in homes for name in home.absent}
        self._absent = tuple(absent.values())
        self._leaves = tuple(
            (home.owner, home.leaf, layout.shape, layout.stride) for home, layout in zip(homes, layouts, strict=True)
        )
        self._checks = tuple(checks)

    def read(self) -> list[torch.Tensor] | None:
        """The live parameters; None where one is no parameter, or anything is not what it was. Raises MOEC230 where
        the code around them changed."""
        for check in self._checks:
            check()
        for table, key, child, attributes in self._steps:
            if table.get(key) is not child or "forward" in attributes:
                return None
        for table, size in self._sizes:
            if len(table) != size:
                return None
        for owner, name in self._absent:
            if owner._parameters.get(name) is not None:
                return None
        found: list[Any] = []
        for owner, leaf, shape, stride in self._leaves:
            tensor = owner._parameters.get(leaf)
            if tensor is None or tensor.shape != shape or tensor.stride() != stride:
                return None
            found.append(tensor)
        return found
