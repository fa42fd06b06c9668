"""What a cut would lose, read off the log and not off values: parameters, bounds and writes among what it replaces.

A value can hide an operation: a scale initialised to one, a clamp at a thousand. So each tensor the replaced operations
read must be in the formula, none of them may bound values outside the named activation, and none may write to what
the call did not make.
"""

from __future__ import annotations

from collections.abc import Collection

from moec.frontends.torch.instances import NotLifted
from moec.frontends.torch.oplog import HOST_READ, Log, Ref, Site

# Operations that leave ordinary values as they are, so that no probe of ordinary values shows them.
_CLIPS = ("clamp", "clamp_min", "clamp_max", "hardtanh", "minimum", "maximum", "nan_to_num", "relu", "abs", "threshold")
_STEPS = ("fmod", "remainder", "round", "floor", "ceil", "trunc")
_BOUNDS = frozenset(name + ending for name in (*_CLIPS, *_STEPS) for ending in ("", "_"))


def check_replaced(
    log: Log,
    result: tuple[int, int],
    replaced: Collection[int],
    named: Collection[int],
    params: Collection[str],
    start: int,
) -> None:
    """Refuse a cut that would lose something on the way to `result`, a (slot, moment).

    `replaced` are the entries the cut drops, `named` those that the formula stands for, `params` the formula's weights.
    """
    behind = log.closure([result], start=start)
    for index in sorted(behind.intersection(replaced)):
        entry = log.entries[index]
        for slot in entry.reads:
            name = log.param_of(slot)
            if name is not None and name not in params:
                raise NotLifted(f"{name!r} is read among the experts' operations but is no part of the formula")
        bounded = any(log.tensors[slot].is_floating_point() for slot in entry.results)
        if entry.name in _BOUNDS and bounded and index not in named:
            raise NotLifted(f"{entry.name} around the experts' products would be lost")


class WritesOutside(NotLifted):
    """A call writes into what existed before it."""


def check_direct(
    log: Log, site: Site, params: Collection[str], named: Collection[int], idle: Collection[int] = ()
) -> None:
    """Refuse to replace a whole call that does more than the formula; `idle` are writes that change nothing."""
    assert isinstance(site.result, Ref)
    check_writes(log, site.start, site.end, site.label, idle)
    check_replaced(log, (site.result.slot, site.end), range(site.start, site.end), named, params, site.start)
    looked = reads_owned(log, site.start, site.end, site.label)
    if looked:
        raise NotLifted(looked)


def idle_clamps(log: Log, site: Site, ids: int, experts: int) -> frozenset[int]:
    """Entries of a call that clamp the ids it is given, in place, to a range that holds all E experts.

    Ids of experts are what they were then. Other ids are no business of a layer whose calls look at theirs.
    """
    given, found = log.tensors[ids], set()
    for entry in log.entries[site.start : site.end]:
        if entry.name != "clamp_" or entry.kwargs or len(entry.args) != 3 or len(entry.writes) != 1:
            continue
        written, (_, lowest, highest) = entry.writes[0], entry.args
        at = log.tensors[written]
        # A view of just the ids: what else lies in their memory may be anything.
        theirs = log.storages[written] == log.storages[ids] and at.is_contiguous() and given.is_contiguous()
        theirs = theirs and (at.numel(), at.storage_offset()) == (given.numel(), given.storage_offset())
        numbers = all(type(bound) in (int, type(None)) for bound in (lowest, highest))
        if theirs and numbers and (lowest or 0) <= 0 and (highest is None or highest >= experts - 1):
            found.add(entry.index)
    return frozenset(found)


def check_writes(log: Log, start: int, end: int, label: str, idle: Collection[int] = ()) -> None:
    """Refuse a call that writes into anything that existed before it; `idle` are writes that change nothing."""
    own: set[int] = set()
    for entry in log.entries[start:end]:
        if entry.index in idle:
            continue
        known = {log.storages[slot] for slot in entry.reads}
        for slot in entry.writes:
            if log.storages[slot] not in own:
                name = log.param_of(slot)
                raise WritesOutside(f"{label} writes into " + (repr(name) if name else "a tensor it did not make"))
        own |= {log.storages[slot] for slot in entry.results} - (known - own)


def reads_owned(log: Log, start: int, end: int, label: str, skip: Collection[int] = ()) -> str | None:
    """Why a call may not be replaced: its code looks at the value of a parameter or buffer, which may change later."""
    for entry in log.entries[start:end]:
        if entry.op != HOST_READ or entry.index in skip:
            continue
        behind = log.closure([(slot, entry.index) for slot in entry.reads], start=start)
        for slot in {s for i in behind for s in log.entries[i].reads}.union(entry.reads):
            name = log.param_of(slot)
            if name is not None and not log.tensors[slot].is_floating_point():
                return f"{label} reads {name!r} on the host and may branch on it"
    return None
