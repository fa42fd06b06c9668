"""Where a store's parameters hang in the live module, and whether they still do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import TYPE_CHECKING, Any

from moec.errors import MoecError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Layout:
    """What a parameter looked like when its views were taken."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Home:
    """How to reach one parameter: each module on the way must still be the one that was compiled."""

    steps: tuple[tuple[dict[str, Any], str, Any], ...]
    owner: Any
    leaf: str
    sizes: tuple[tuple[dict[str, Any], int], ...] = ()
    """The containers on the way and how many modules they held: an expert added later is not in the formula."""
    absent: tuple[str, ...] = ()
    """Parameters the owner did not have, such as a bias: the formula has none either."""

    @classmethod
    def of(cls, module: torch.nn.Module, name: str) -> Home:
        *path, leaf = name.split(".")
        steps, owner = [], module
        for part in path:
            child = owner._modules.get(part)
            if child is None:
                raise MoecError("MOEC230", f"the module has no weight {name!r}", hint="call moec.refresh(model)")
            steps.append((owner._modules, part, child))
            owner = child
        sizes = tuple((table, len(table)) for table, _, _ in steps)
        absent = tuple(name for name, p in owner._parameters.items() if p is None)
        return cls(tuple(steps), owner, leaf, sizes, absent)

    def read(self) -> torch.Tensor | None:
        """The live tensor; None when a module on the way was replaced, or the tensor is gone."""
        for table, key, expected in self.steps:
            if table.get(key) is not expected or "forward" in expected.__dict__:
                return None
        for container, size in self.sizes:
            if len(container) != size:
                return None
        for name in self.absent:
            if self.owner._parameters.get(name) is not None:
                return None
        found = self.owner._parameters.get(self.leaf)
        if found is None:
            found = self.owner._buffers.get(self.leaf)
        return found  # type: ignore[no-any-return]

    def holder(self) -> dict[str, Any]:
        """The table that the tensor is in."""
        own: dict[str, Any] = self.owner._parameters
        return own if own.get(self.leaf) is not None else self.owner._buffers


class Places:
    """Where a store's parameters were, to be compared in a few passes at the speed of C: lists of experts are long."""

    def __init__(self, homes: Iterable[Home]) -> None:
        steps = {(id(table), key): (table, key, child) for home in homes for table, key, child in home.steps}
        self._tables = [table for table, _, _ in steps.values()]
        self._keys = [key for _, key, _ in steps.values()]
        self._children = [child for _, _, child in steps.values()]
        self._attributes = [child.__dict__ for child in self._children]
        sizes = {id(table): (table, size) for home in homes for table, size in home.sizes}
        self._containers, self._sizes = [t for t, _ in sizes.values()], [size for _, size in sizes.values()]
        absent = {(id(home.owner), name): (home.owner, name) for home in homes for name in home.absent}
        self._absent_from = [owner._parameters for owner, _ in absent.values()]
        self._absent = [name for _, name in absent.values()]
        self._owners = [home.holder() for home in homes]
        self._leaves = [home.leaf for home in homes]
        self._tensors = list(map(dict.get, self._owners, self._leaves))
        self._addresses = self._where(self._tensors)

    @staticmethod
    def _where(tensors: Sequence[Any]) -> list[tuple[Any, ...]]:
        return [(t.data_ptr(), t.stride(), t.shape, t.dtype, t.device) for t in tensors]

    def same(self) -> bool:
        """Whether every module and parameter is still the one it was, with its memory where it was."""
        now = list(map(dict.get, self._owners, self._leaves))
        return (
            all(map(is_, now, self._tensors))
            and all(map(is_, map(dict.get, self._tables, self._keys), self._children))
            and not any("forward" in attributes for attributes in self._attributes)
            and list(map(len, self._containers)) == self._sizes
            and not any(found is not None for found in map(dict.get, self._absent_from, self._absent))
            and self._where(now) == self._addresses
        )
