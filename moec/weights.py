"""Where a region's weights live: strided views of the user's own parameters, read live and never copied.

N outputs, C inputs of a matrix; E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import TYPE_CHECKING, Any

from moec.errors import MoecError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class View:
    """A strided view of one parameter, in elements; `offset` counts from the parameter's own storage offset."""

    param: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Layout:
    """What a parameter looked like when its views were taken."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Home:
    """How to reach one parameter: each module on the way must still be the one that was compiled."""

    steps: tuple[tuple[dict[str, Any], str, Any], ...]
    owner: Any
    leaf: str
    sizes: tuple[tuple[dict[str, Any], int], ...] = ()
    """The containers on the way and how many modules they held: an expert added later is not in the formula."""
    absent: tuple[str, ...] = ()
    """Parameters the owner did not have, such as a bias: the formula has none either."""

    @classmethod
    def of(cls, module: torch.nn.Module, name: str) -> _Home:
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


class _Places:
    """Where a store's parameters were, to be compared in a few passes at the speed of C: lists of experts are long."""

    def __init__(self, homes: Iterable[_Home]) -> None:
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


class WeightStore:
    """Named weights of one region as views of `module`'s parameters.

    `views[name]` is one `View` (a dense weight) or a tuple of them (one per expert). Parameters are looked up by name
    on each read, so `load_state_dict`, `.to()` and replaced parameters are seen at once. A parameter whose shape or
    strides changed, or whose module was replaced, raises MOEC230.
    """

    def __init__(self, module: torch.nn.Module, views: Mapping[str, View | tuple[View, ...]]) -> None:
        self.module = module
        self.views = dict(views)
        names = sorted({view.param for entry in self.views.values() for view in _as_tuple(entry)})
        self._checks: dict[str, Callable[[], None]] = {}
        self._homes = {name: _Home.of(module, name) for name in names}
        self._layouts = {name: _Layout(tuple(p.shape), tuple(p.stride())) for name in names for p in [self.param(name)]}
        self._places: _Places | None = None
        self._placement = 0
        self._seen: tuple[int, list[torch.Tensor], list[tuple[Any, ...]]] | None = None
        self._even = {name: _even_step(entry) for name, entry in self.views.items() if isinstance(entry, tuple)}

    @property
    def params(self) -> tuple[str, ...]:
        """Names of the parameters the views lie in, relative to `module`."""
        return tuple(self._homes)

    @property
    def layouts(self) -> Mapping[str, Hashable]:
        """Shape and strides of each parameter when the views were taken."""
        return self._layouts

    def placement(self) -> int:
        """A number that changes when a parameter was replaced or its memory is elsewhere; writes in place keep it.

        Raises what `check` raises.
        """
        self.ask()
        places = self._places
        if places is None or not places.same():
            self._places = None
            self.check()
            places = _Places(list(self._homes.values()))
            self._placement += 1
            self._places = places
        return self._placement

    def watch(self, checks: Mapping[str, Callable[[], None]]) -> None:
        """Ask `checks[name]` whenever that parameter is read: it raises MOEC230 where the code around it changed."""
        self._checks = dict(checks)

    def ask(self) -> None:
        """Ask what is watched of all parameters; raises MOEC230."""
        for check in self._checks.values():
            check()

    def check(self) -> None:
        """Raise MOEC230 unless every parameter is where it was, in the layout it had."""
        for name, home in self._homes.items():
            found = home.read()
            if found is None:
                raise _missing(name)
            self._fits(name, found)

    def param(self, name: str) -> torch.Tensor:
        """The live parameter (or buffer) called `name`."""
        if name in self._checks:
            self._checks[name]()
        found = self._homes[name].read()
        if found is None:
            raise _missing(name)
        return found

    def _live(self, name: str) -> torch.Tensor:
        return self._fits(name, self.param(name))

    def _fits(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        layout = self._layouts[name]
        if tensor.shape != layout.shape or tensor.stride() != layout.stride:
            was, now = (layout.shape, layout.stride), (tuple(tensor.shape), tensor.stride())
            raise MoecError(
                "MOEC230",
                f"weight {name!r} changed from shape {was[0]}, strides {was[1]} to {now[0]}, {now[1]}",
                hint="call moec.refresh(model) after changing the layout of parameters",
            )
        return tensor

    def _read(self, view: View) -> torch.Tensor:
        tensor, layout = self._live(view.param), self._layouts[view.param]
        if view.offset == 0 and view.shape == layout.shape and view.stride == layout.stride:
            return tensor
        return tensor.as_strided(view.shape, view.stride, tensor.storage_offset() + view.offset)

    def experts(self, name: str) -> Sequence[torch.Tensor]:
        """E live zero-copy tensors, [N, C] matrices or [N] biases, in expert order."""
        whole = self.stacked(name)
        return whole.unbind(0) if whole is not None else _LazyExperts(self, _as_tuple(self.views[name]))

    def stacked(self, name: str) -> torch.Tensor | None:
        """One live zero-copy tensor [E, ...], or None when the experts are not evenly spaced in one parameter."""
        entry = self.views[name]
        step = self._even.get(name)
        if step is None or not isinstance(entry, tuple):
            return None
        first = entry[0]
        tensor, layout = self._live(first.param), self._layouts[first.param]
        shape, stride = (len(entry), *first.shape), (step, *first.stride)
        if first.offset == 0 and shape == layout.shape and stride == layout.stride:
            return tensor
        return tensor.as_strided(shape, stride, tensor.storage_offset() + first.offset)

    def dense(self, name: str) -> torch.Tensor:
        """The live zero-copy tensor of a weight that is not per expert."""
        entry = self.views[name]
        if isinstance(entry, tuple):
            raise MoecError("MOEC230", f"weight {name!r} is per expert, a dense weight was expected")
        return self._read(entry)

    def version(self) -> Hashable:
        """Changes when a parameter is replaced, moved, cast or written in place; `p.data` writes are not seen."""
        tensors = list(map(self.param, self._homes))
        looks = [(p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype) for p in tensors]
        seen = self._seen
        # Compared as objects: a number or an address may come back with another tensor.
        if seen is None or not (all(map(is_, tensors, seen[1])) and looks == seen[2]):
            self._seen = seen = (seen[0] + 1 if seen is not None else 0, tensors, looks)
        return seen[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters the views lie in."""
        return sum(p.numel() * p.element_size() for p in map(self.param, self._homes))

    def standing_in(self, tensors: Mapping[str, torch.Tensor]) -> WeightStore:
        """The same views of other tensors, such as gradients, laid out like the parameters of these names."""
        return _StandIns(self, tensors)


class _StandIns(WeightStore):
    """Reads tensors that are given instead of a module's."""

    def __init__(self, store: WeightStore, tensors: Mapping[str, torch.Tensor]) -> None:
        self.__dict__.update(vars(store))
        self._tensors = tensors

    def param(self, name: str) -> torch.Tensor:
        return self._tensors[name]


class _LazyExperts(Sequence["torch.Tensor"]):
    """Reads an expert's view only when asked: only hit experts are touched."""

    def __init__(self, store: WeightStore, views: tuple[View, ...]) -> None:
        self._store, self._views = store, views

    def __len__(self) -> int:
        return len(self._views)

    def __getitem__(self, index: int) -> torch.Tensor:  # type: ignore[override]
        return self._store._read(self._views[index])


def _missing(name: str) -> MoecError:
    return MoecError(
        "MOEC230",
        f"weight {name!r} is not in the module that was compiled",
        hint="call moec.refresh(model) after replacing modules",
    )


def _as_tuple(entry: View | tuple[View, ...]) -> tuple[View, ...]:
    return entry if isinstance(entry, tuple) else (entry,)


def _even_step(views: tuple[View, ...]) -> int | None:
    """Distance between consecutive experts in one parameter, None where there is no single one."""
    first = views[0]
    if any((v.param, v.shape, v.stride) != (first.param, first.shape, first.stride) for v in views):
        return None
    if len(views) == 1:
        return max((n * s for n, s in zip(first.shape, first.stride, strict=True)), default=1)
    step = views[1].offset - first.offset
    # A tensor cannot go backwards.
    even = step >= 0 and all(v.offset == first.offset + i * step for i, v in enumerate(views))
    return step if even else None
