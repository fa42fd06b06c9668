"""Is a layer's replaced code still what was compiled? Asked on each call, so each question is a few steps in C.

What belongs to one expert alone is asked when that expert's weights are read: the cost does not grow with E.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from types import FunctionType
from typing import Any

from torch import nn

from moec.errors import MoecError
from moec.frontends.torch.reads import classes_of, names_in
from moec.frontends.torch.taken import Row
from moec.weights import View

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
HASHOOKS = "a submodule that the compiled layer replaces has hooks"
IN_TRAINING = "the layer is in training mode"
_GONE = "<missing>"

Pick = Callable[[Mapping[str, Any]], tuple[Any, ...]]


class Guard:
    """Some of the rows, bound to a live module, with the hooks and modes of the submodules at `paths`.

    `training` says that training mode is served too, so that modes do not matter.
    """

    def __init__(
        self,
        module: nn.Module,
        rows: Iterable[Row],
        paths: Iterable[str],
        weightless: Iterable[str],
        *,
        training: bool = False,
    ) -> None:
        self._rows: list[tuple[Mapping[str, Any], Pick, tuple[Any, ...], str, tuple[str, ...]]] = []
        self._objects: list[tuple[Mapping[str, Any], str, Any, str]] = []
        self._absent: list[list[Any]] = []
        for row in rows:
            self._bind(module, row)
        parts = [module.get_submodule(path) for path in paths]
        self._hooks = tuple(getattr(part, name) for part in parts for name in HOOKS if part is not module)
        modal = () if training else dict.fromkeys(parts)
        self._modes = tuple(p.__dict__ for p in modal if p is module or has_modes(p))
        for path in weightless:
            parent, _, name = path.rpartition(".")
            table = module.get_submodule(parent)._modules
            self._objects.append((table, name, table[name], f"submodule {path!r}"))
        self._plain = not (self._rows or self._objects or self._absent)

    def _bind(self, module: nn.Module, row: Row) -> None:
        table = row.table
        if table is None:
            table = module.get_submodule(row.path or "").__dict__
            if row.attribute:
                table = getattr(table.get(row.attribute), "__dict__", {})
        if row.keys:
            # Twice the one key: itemgetter gives a tuple for two, and tuples are compared by identity first.
            keys = row.keys if len(row.keys) > 1 else row.keys * 2
            values = row.values if len(row.keys) > 1 else row.values * 2
            self._rows.append((table, itemgetter(*keys), values, row.owner, row.keys))
        for name, kind in row.objects:
            found = table.get(name, _GONE)
            self._objects.append((table, name, found if type(found) is kind else _GONE, _named(name, row.owner)))
        if row.absent:
            self._absent.append([table, -1, row.absent, row.owner])

    def changed(self) -> str:
        """What is no longer as it was compiled; empty when nothing is."""
        for table, pick, values, owner, keys in self._rows:
            try:
                if pick(table) == values:
                    continue
            except Exception:  # a value that cannot be compared, or that is gone, is another value
                pass
            return _difference(table, keys, values, owner)
        for table, name, value, what in self._objects:
            if table.get(name) is not value:
                return f"{what} was replaced after compiling"
        for entry in self._absent:
            table, size, names, owner = entry
            if len(table) != size:
                # A submodule that is compiled on its own has its forward from moec.
                found = sorted(n for n in table.keys() & names if not getattr(table[n], "is_moecs", False))
                if found:
                    return f"{_named(found[0], owner)} was set after compiling"
                entry[1] = len(table)
        return ""

    def blocked(self) -> str:
        """Why the compiled layer cannot serve a call now; empty when it can."""
        for attributes in self._modes:
            if attributes["training"]:
                return IN_TRAINING
        if any(self._hooks):
            return HASHOOKS
        return self.changed()

    def check(self) -> None:
        """Raise MOEC230 when blocked. Asked for each hit expert: most have nothing but hooks and modes."""
        if self._plain and not any(self._hooks) and not any(attributes["training"] for attributes in self._modes):
            return
        why = self.blocked()
        if why:
            raise MoecError("MOEC230", why, hint="call moec.refresh(model)")


def has_modes(module: nn.Module) -> bool:
    """Whether training mode may be another function: a dropout's is, and may be switched on its own."""
    for cls in classes_of([module]):
        if not cls.__module__.startswith("torch.nn.modules"):
            return True
        if any(isinstance(f, FunctionType) and "training" in names_in(f.__code__) for f in vars(cls).values()):
            return True
    return False


def _named(name: str, owner: str) -> str:
    return f"{name!r} of {owner or 'the layer'}"


def _difference(table: Mapping[str, Any], keys: Sequence[str], values: Sequence[Any], owner: str) -> str:
    for key, was in zip(keys, values, strict=False):
        now = table.get(key, _GONE)
        if not (now is was or _equal(now, was)):
            short = all(isinstance(v, int | float | str | bool | None) for v in (now, was))
            what = _named(key, owner)
            if not short:
                return f"{what} was changed after compiling"
            return f"{what} is {now!r}, it was {was!r} when compiled"
    return f"an attribute of {owner or 'the layer'} was changed after compiling"


def _equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except Exception:
        return False


class Guards:
    """All guards of one compiled layer: one asked on each call, and one for each expert that has modules of its own."""

    def __init__(
        self,
        module: nn.Module,
        rows: Sequence[Row],
        paths: Sequence[str],
        views: Mapping[str, View | tuple[View, ...]],
        *,
        training: bool = False,
    ) -> None:
        owners = _experts_by_prefix(views)
        alone: dict[int, list[str]] = {}
        homes: dict[int, str] = {}
        shared = _shared(module, paths)
        for path in paths:
            expert = _expert_of(path, owners) if path not in shared else None
            if expert is not None:
                alone.setdefault(expert, []).append(path)
        own = {path for found in alone.values() for path in found}
        weightless = {path for path in paths if path not in owners}
        # The store itself asks whether a module with weights had its forward overridden.
        rows = [r for r in rows if r.path in weightless or r.keys or r.objects or r.absent != {"forward"}]
        front = [path for path in paths if path not in own]
        self.front = Guard(
            module,
            [r for r in rows if r.path not in own],
            ["", *front],
            [p for p in front if p in weightless],
            training=training,
        )
        for entry in views.values():
            for expert, view in enumerate(entry if isinstance(entry, tuple) else ()):
                homes.setdefault(expert, view.param)
        self.by_weight = {
            homes[e]: Guard(
                module,
                [r for r in rows if r.path in found],
                found,
                [p for p in found if p in weightless],
                training=training,
            )
            for e, found in ((e, set(found)) for e, found in alone.items())
        }

    def changed(self) -> str:
        """What is no longer as it was compiled, in any expert."""
        return self.front.changed() or next((why for g in self.by_weight.values() if (why := g.changed())), "")


def _experts_by_prefix(views: Mapping[str, View | tuple[View, ...]]) -> dict[str, set[int]]:
    """For each module on the way to a weight, the experts whose weights lie under it; -1 for a dense weight."""
    found: dict[str, set[int]] = {}
    for entry in views.values():
        numbered = enumerate(entry) if isinstance(entry, tuple) else [(-1, entry)]
        for expert, view in numbered:
            path = view.param
            while path:
                path = path.rpartition(".")[0]
                found.setdefault(path, set()).add(expert)
    return found


def _expert_of(path: str, owners: Mapping[str, set[int]]) -> int | None:
    """The only expert the module at `path` can belong to, None when it serves several."""
    while path not in owners and path:
        path = path.rpartition(".")[0]
    experts = owners.get(path, set())
    (only,) = experts if len(experts) == 1 else (-1,)
    return only if path and only >= 0 else None


def _shared(module: nn.Module, paths: Iterable[str]) -> set[str]:
    """Paths of modules that are reached by more than one path."""
    seen: dict[int, list[str]] = {}
    for path in paths:
        seen.setdefault(id(module.get_submodule(path)), []).append(path)
    return {path for found in seen.values() if len(found) > 1 for path in found}
