"""A block's log as items around the experts: single entries, and whole calls of submodules that stay calls.

The *prefix* ends where the first expert computes, the *suffix* begins after the last one has. Both run the same items
whatever the shape and the routing, so two logs of one block are aligned from the front and from the back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moec.frontends.torch.guard import HOOKS
from moec.frontends.torch.oplog import HOST_READ, Entry, Log, Site, slots


@dataclass(frozen=True)
class Item:
    """Entries [start, end): one ATen call, or one call of a submodule's forward."""

    start: int
    end: int
    entry: Entry | None
    site: Site | None

    @property
    def name(self) -> str:
        return self.entry.name if self.entry is not None else f"call {self.site.path}"  # type: ignore[union-attr]

    @property
    def arguments(self) -> Any:
        return (self.entry.args, self.entry.kwargs) if self.entry is not None else (self.site.args, self.site.kwargs)  # type: ignore[union-attr]

    @property
    def outputs(self) -> Any:
        return self.entry.outs if self.entry is not None else self.site.result  # type: ignore[union-attr]

    @property
    def reads(self) -> tuple[int, ...]:
        return slots(self.arguments)

    @property
    def results(self) -> tuple[int, ...]:
        return slots(self.outputs)


@dataclass(frozen=True)
class Blocks:
    """One call of a block: its items before, among and after the experts."""

    log: Log
    site: Site
    prefix: tuple[Item, ...]
    suffix: tuple[Item, ...]
    first: int
    last: int

    @property
    def items(self) -> tuple[Item, ...]:
        return (*self.prefix, *self.suffix)


def split(log: Log, site: Site, expert_entries: Sequence[int], *, opened: bool = False) -> Blocks:
    """The items of `site` around the experts, whose entries are given.

    `opened` takes submodules apart into their entries, where what is looked for lies inside one. Those with hooks stay
    calls.
    """
    first, last = min(expert_entries), max(expert_entries)
    children = _folded(log, site, frozenset(expert_entries))
    if opened:
        children = {start: child for start, child in children.items() if _hooked(child.module)}
    prefix = tuple(_items(log, children, site.start, first))
    suffix = tuple(_items(log, children, last + 1, site.end))
    return Blocks(log, site, prefix, suffix, first, last)


def outside(log: Log, site: Site, expert_entries: Sequence[int]) -> Blocks:
    """All items of `site` but the experts' own entries, wherever they stand between those, as one prefix."""
    taken = frozenset(expert_entries)
    children = _folded(log, site, taken)
    items = _items(log, children, site.start, site.end)
    own = tuple(item for item in items if item.entry is None or item.entry.index not in taken)
    return Blocks(log, site, own, (), site.end, site.start)


def _folded(log: Log, site: Site, experts: frozenset[int]) -> dict[int, Site]:
    """Outermost submodule calls inside the site without an expert's entry, by their first entry."""
    found: dict[int, Site] = {}
    covered = site.start
    for other in log.sites:
        inside = other is not site and site.start <= other.start and other.end <= site.end and other.end > other.start
        if (
            not inside
            or other.method != "forward"
            or other.start < covered
            or other.module is site.module
            or _encloses(other, site)
        ):
            continue
        if any(i in experts for i in range(other.start, other.end)):
            continue
        found[other.start] = other
        covered = other.end
    return found


def _hooked(module: torch.nn.Module) -> bool:
    return any(getattr(part, name) for part in module.modules() for name in HOOKS)


def _encloses(other: Site, site: Site) -> bool:
    parent: Site | None = site
    while parent is not None:
        if parent is other:
            return True
        parent = parent.parent
    return False


def _items(log: Log, folded: dict[int, Site], start: int, end: int) -> Iterator[Item]:
    index = start
    while index < end:
        site = folded.get(index)
        if site is not None and site.end <= end:
            yield Item(index, site.end, None, site)
            index = site.end
            continue
        entry = log.entries[index]
        if entry.op != HOST_READ:
            yield Item(index, index + 1, entry, None)
        index += 1


def needed(blocks: Blocks, wanted: Sequence[tuple[int, int]], *given_after: tuple[int, int]) -> list[Item] | None:
    """Items that the wanted (slot, moment) values need, taking each slot y[0] of the last as given after entry y[1].

    None when one of them lies among the experts.
    """
    log = blocks.log
    by_entry = {i: item for item in blocks.items for i in range(item.start, item.end)}
    kept: dict[int, Item] = {}
    todo = list(wanted)
    given = {log.storages[slot]: moment for slot, moment in given_after}
    known = {slot for slot, _ in given_after}
    while todo:
        slot, at = todo.pop()
        since = given.get(log.storages[slot], -1)
        sources = [i for i in log.writers(slot, at) if i > since]
        made = log.makers(slot, at)
        if made and slot not in known:
            # The same view may be taken more than once, also inside a call that does not hand it out.
            shown = (
                i for i in reversed(made) if i < blocks.site.start or (i in by_entry and slot in by_entry[i].results)
            )
            sources.append(next(shown, made[0]))
        for index in sources:
            if index < blocks.site.start:
                continue
            item = by_entry.get(index)
            if item is None:
                return None
            if item.start not in kept:
                kept[item.start] = item
                todo.extend((read, item.start) for read in item.reads)
    return [kept[i] for i in sorted(kept)]
