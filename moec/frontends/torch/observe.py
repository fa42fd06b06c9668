"""Getting a block to run: the inputs it was seen with, or probes made from its parameters' sizes.

B sequences, S positions, D width, T = B * S tokens.
"""

from __future__ import annotations

import copy
import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from moec.frontends.torch.binding import Binder
from moec.frontends.torch.contained import contained
from moec.frontends.torch.effects import Watch
from moec.frontends.torch.instances import NotLifted
from moec.frontends.torch.oplog import Log, Ref
from moec.frontends.torch.recorder import record
from moec.trees import tree_flatten, tree_map

SCALES = (0.05, 0.2, 1.0, 8.0, 30.0, 60.0)


def tokens(
    shape: Sequence[int], dtype: torch.dtype, seed: int, *, device: torch.device, mixed: bool = True
) -> torch.Tensor:
    """Random rows, each at a scale of its own when `mixed`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tuple(shape), generator=generator)
    if mixed:
        pick = torch.randint(len(SCALES), tuple(shape[:-1]), generator=generator)
        x = x * torch.tensor(SCALES)[pick].unsqueeze(-1)
    return x.to(device, dtype)


# How far above a candidate a module to run is looked for: the block, and the layer around it.
_LEVELS = 4


class ProbeFailed(NotLifted):
    """The user's code raised on a probe."""


@contextmanager
def users_code(label: str) -> Iterator[None]:
    """Whatever the user's code raises on a probe becomes a ProbeFailed that names the user's own line."""
    try:
        yield
    except Exception as error:
        raise ProbeFailed(f"{label or 'the model'}: {raised(error)}") from error


@dataclass(frozen=True)
class Driver:
    """A module to run for a candidate, and the arguments that run it."""

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    width: int | None = None
    rank: int = 3

    def watch(self) -> Watch:
        """For several runs of the module that have no effects: its state is looked at once."""
        return Watch(self.module)

    def observe(self, watch: Watch | None = None) -> tuple[Log, list[str]]:
        """Log of one run, and the effects it had (undone)."""
        watch = watch or self.watch()
        watch.listen()
        args, kwargs = tree_map(_own, (self.args, self.kwargs))
        given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        watch.inputs = [(t, t._version) for t in given if not t.is_inference()]
        try:
            with users_code(self.path):
                log = record(self.module, args, kwargs, path=self.path)
            effects = watch.changes()
            return log, self._others(log, effects, watch) if effects else []
        finally:
            watch.undo()

    def _others(self, log: Log, effects: list[str], watch: Watch) -> list[str]:
        """The effects but for attributes that modules set on themselves; the log keeps the names of those."""
        changed = watch.assigned()
        phrases = {f"sets attribute {name!r}": name for name in changed}
        if not changed or not set(effects) <= set(phrases):
            return effects

        def again() -> None:
            args, kwargs = tree_map(_own, (self.args, self.kwargs))
            with users_code(self.path), torch.no_grad():
                self.module(*args, **kwargs)

        found = contained(log, self.module, self.path, changed, again)
        log.contained = frozenset(f"{self.path}.{name}".lstrip(".") for name in found)
        return [effect for effect in effects if phrases[effect] not in found]

    @property
    def main(self) -> torch.Tensor | None:
        """The tokens among the arguments: the first float tensor [T, D] or [B, S, D]."""
        leaves = tree_flatten((self.args, self.kwargs))[0]
        return next((v for v in leaves if isinstance(v, torch.Tensor) and is_tokens(v)), None)

    def with_input(self, x: torch.Tensor) -> Driver:
        """The same driver on other tokens; other tensors, such as masks, repeated or cut to fit."""
        main = self.main
        assert main is not None
        sizes = fitting(main.shape, x.shape)

        def other(value: Any) -> Any:
            if value is main:
                return x
            return resized(value, sizes(value.shape)) if isinstance(value, torch.Tensor) else value

        args, kwargs = tree_map(other, (self.args, self.kwargs))
        return Driver(self.path, self.module, args, kwargs, self.width, self.rank)


def is_tokens(value: torch.Tensor) -> bool:
    """Whether a tensor may hold tokens."""
    return value.is_floating_point() and value.dim() in (2, 3)


def fitting(old: Sequence[int], new: Sequence[int]) -> Callable[[Sequence[int]], tuple[int, ...]]:
    """How the shapes of other tensors change with that of the tokens: sizes that are theirs, or all of them, follow."""
    follow = {math.prod(old[:-1]): math.prod(new[:-1])}
    follow.update(reversed(list(zip(old[:-1], new[:-1], strict=True))))
    return lambda shape: tuple(new[0] if not i and n == old[0] else follow.get(n, n) for i, n in enumerate(shape))


def resized(value: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The tensor repeated, or cut, to a shape."""
    for axis, size in enumerate(shape):
        if value.shape[axis] != size:
            value = value.index_select(axis, torch.arange(size, device=value.device) % max(1, value.shape[axis]))
    return value.contiguous()


@dataclass
class Drivers:
    """Makes drivers for candidates, from the calls of one run of the model on the user's inputs where there are any."""

    model: nn.Module
    captured: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    hopeless: set[tuple[str, int, int]] = field(default_factory=set)
    served: dict[tuple[object, ...], tuple[int, int]] = field(default_factory=dict)
    """Width and rank of the tokens that served the last module of a kind: what is tried first on the next."""

    def failed(self, driver: Driver, failure: ProbeFailed) -> None:
        """Remember a probe that the user's code refused, so that the next candidate does not try it again."""
        self.failures.append(str(failure))
        if driver.width is not None:
            self.hopeless.add((driver.path, driver.width, driver.rank))

    def serves(self, driver: Driver) -> None:
        """Remember the tokens that a layer was found with, so that layers alike are run on such first."""
        if driver.width is not None:
            self.served[_kind(driver.module)] = (driver.width, driver.rank)

    def capture(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model once and remember the arguments of each module's first call; returns the model's result."""
        watch = Watch(self.model)
        try:
            log = record(self.model, args, kwargs)
        finally:
            watch.undo()
        for site in log.sites:
            if site.method == "forward" and site.path not in self.captured:
                given = tree_map(lambda v, at=site.start: _value(log, v, at), (site.args, site.kwargs), is_leaf=_is_ref)
                self.captured[site.path] = given
        # Probes run on what calls were given, and a cache that grows there may be a part of the result.
        return tree_map(
            lambda v: _value(log, v, len(log.entries)) if _is_ref(v) else _own(v), log.result, is_leaf=_is_ref
        )

    def drivers(self, name: str, widths: Sequence[int], dtype: torch.dtype, device: torch.device) -> Iterator[Driver]:
        """Drivers for the candidate called `name`, smallest module first."""
        path: str | None = name
        for _ in range(_LEVELS):
            if path is None:
                return
            module = self.model.get_submodule(path)
            if path in self.captured:
                args, kwargs = self.captured[path]
                yield from self._alike(Driver(path, module, args, kwargs))
            else:
                yield from self._made(path, module, widths, dtype, device)
            path = path.rpartition(".")[0] if path else None

    def _alike(self, seen: Driver) -> Iterator[Driver]:
        """A captured call with fresh numbers for its tokens, then the call as it was."""
        x = seen.main
        if x is not None and all(x.shape):
            shape = (2, 20, x.shape[-1]) if x.dim() == 3 else (40, x.shape[-1])
            made = seen.with_input(tokens(shape, x.dtype, 1, device=x.device))
            yield Driver(made.path, made.module, made.args, made.kwargs, x.shape[-1], x.dim())
        yield seen

    def _made(
        self, path: str, module: nn.Module, widths: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Iterator[Driver]:
        required = Binder(module.forward).required
        if type(module).forward is nn.Module.forward or (
            isinstance(module, (nn.ModuleList, nn.ModuleDict)) and not required
        ):
            return
        if len(required) > 1:
            self.failures.append(f"{path or 'the model'} needs {', '.join(required)}")
            return
        first = self.served.get(_kind(module))
        trials = [(width, rank) for width in widths for rank in (3, 2)]
        for width, rank in sorted(trials, key=lambda trial: trial != first):
            if (path, width, rank) not in self.hopeless:
                shape = (2, 20, width) if rank == 3 else (40, width)
                yield Driver(path, module, (tokens(shape, dtype, 1, device=device),), {}, width, rank)


def _kind(module: nn.Module) -> tuple[object, ...]:
    """Equal for modules of one class whose parameters have the same names, shapes and types."""
    return type(module), *((name, tuple(p.shape), p.dtype) for name, p in module.named_parameters())


def _own(value: Any) -> Any:
    """A copy that a run may change: of a tensor, or of an object such as a cache of keys and values."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if not hasattr(value, "__dict__") or isinstance(value, (nn.Module, type)) or callable(value):
        return value
    try:
        return copy.deepcopy(value)
    except Exception:  # the user's object may refuse to be copied in any way
        return value


def _is_ref(value: Any) -> bool:
    return isinstance(value, Ref)


def _value(log: Log, value: Any, at: int) -> Any:
    return log.value(value.slot, at) if _is_ref(value) else value


def raised(error: Exception) -> str:
    """The error of a probe with the user's own line it came from."""
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if "/torch/" not in f.filename and "/moec/" not in f.filename
    ]
    where = f" ({frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno} in {frames[-1].name})" if frames else ""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}{where}"
