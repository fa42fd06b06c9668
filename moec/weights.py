"""Where a region's weights live: strided views of the user's own parameters, read live and never copied.

N outputs, C inputs of a matrix; E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import TYPE_CHECKING, Any

from moec.branches import Branch
from moec.errors import MoecError
from moec.homes import Home, Layout, Places

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class View:
    """A strided view of one parameter, in elements; `offset` counts from the parameter's own storage offset."""

    param: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


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
        self._homes = {name: Home.of(module, name) for name in names}
        self._layouts = {name: Layout(tuple(p.shape), tuple(p.stride())) for name in names for p in [self.param(name)]}
        self._places: Places | None = None
        self._placement = 0
        self._seen: tuple[int, list[torch.Tensor], list[tuple[Any, ...]]] | None = None
        self._branches: dict[tuple[str, ...], list[Branch | None]] = {}
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
            places = Places(list(self._homes.values()))
            self._placement += 1
            self._places = places
        return self._placement

    def watch(self, checks: Mapping[str, Callable[[], None]]) -> None:
        """Ask `checks[name]` whenever that parameter is read: it raises MOEC230 where the code around it changed."""
        self._checks = dict(checks)
        self._branches.clear()

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
        return whole.unbind(0) if whole is not None else LiveExperts(self, name, _as_tuple(self.views[name]))

    def read(self, names: tuple[str, ...], experts: Iterable[int]) -> list[list[torch.Tensor]]:
        """For each of these experts, its live tensors under all of the names: `experts(name)[e]`, asked together."""
        branches = self._branches.get(names)
        if branches is None:
            each = zip(*(_as_tuple(self.views[name]) for name in names), strict=True)
            branches = self._branches[names] = [self._branch(views) for views in each]
        found = []
        for e in experts:
            branch = branches[e]
            tensors = branch.read() if branch is not None else None
            # One by one says what is wrong, and has room for buffers and for parts of parameters.
            found.append(tensors or [self._read(_as_tuple(self.views[name])[e]) for name in names])
        return found

    def _branch(self, views: Iterable[View]) -> Branch | None:
        """The views of one expert as parameters to be read together, None where they are not whole parameters."""
        views = list(views)
        layouts = [self._layouts[view.param] for view in views]
        if any((v.offset, v.shape, v.stride) != (0, at.shape, at.stride) for v, at in zip(views, layouts, strict=True)):
            return None
        checks = dict.fromkeys(self._checks[view.param] for view in views if view.param in self._checks)
        return Branch([self._homes[view.param] for view in views], layouts, checks)

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
        self._tensors, self._branches = tensors, {}

    def param(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def _branch(self, views: Iterable[View]) -> Branch | None:
        return None


class LiveExperts(Sequence["torch.Tensor"]):
    """Reads an expert's view only when asked, and anew each time: only hit experts are touched."""

    def __init__(self, store: WeightStore, name: str, views: tuple[View, ...]) -> None:
        self.store, self.name, self._views = store, name, views

    def __len__(self) -> int:
        return len(self._views)

    def __getitem__(self, index: int) -> torch.Tensor:  # type: ignore[override]
        return self.store._read(self._views[index])


def read_together(weights: Sequence[object], experts: Sequence[int]) -> list[list[torch.Tensor]] | None:
    """For each of the experts, its `weights[i][e]` for each i, asked of their store at once; None without such."""
    live = [w for w in weights if isinstance(w, LiveExperts)]
    if len(live) != len(weights) or any(w.store is not live[0].store for w in live):
        return None
    return live[0].store.read(tuple([w.name for w in live]), experts)


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
