"""Run a part of a log again with some of its tensors replaced: how recorded code is asked what it computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from moec.frontends.torch.oplog import HOST_READ, Log, Ref
from moec.trees import tree_flatten, tree_map


def replay(log: Log, entries: Iterable[int], given: Mapping[int, torch.Tensor], wanted: int) -> torch.Tensor:
    """Value of slot `wanted` after re-running `entries` in order.

    Slots in `given` have the given values, all others the recorded ones. Raises what the ops raise: a recorded shape
    may not fit a given value.
    """
    return replay_all(log, entries, given)[wanted]


def replay_all(log: Log, entries: Iterable[int], given: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """The same, with the values of all slots that were given, read or made."""
    env: dict[int, torch.Tensor] = dict(given)
    with torch.no_grad():
        for index in sorted(entries):
            entry = log.entries[index]
            if entry.op == HOST_READ:
                continue

            def read(leaf: Any, at: int = index, writes: tuple[int, ...] = entry.writes) -> Any:
                if not isinstance(leaf, Ref):
                    return leaf
                if leaf.slot in env:
                    return env[leaf.slot]
                value = log.value(leaf.slot, at)
                if value is None:
                    raise ValueError("a recorded value was too large to keep")
                # The recorded tensor itself must survive an in-place op of the replay.
                env[leaf.slot] = value.clone() if leaf.slot in writes else value
                return env[leaf.slot]

            out = entry.op(*tree_map(read, entry.args), **tree_map(read, entry.kwargs))
            for slot, value in zip(_slots(entry.outs), tree_flatten(out)[0], strict=True):
                if slot is not None and slot not in given:
                    env[slot] = value
    return env


def _slots(tree: Any) -> list[int | None]:
    return [leaf.slot if isinstance(leaf, Ref) else None for leaf in tree_flatten(tree)[0]]
