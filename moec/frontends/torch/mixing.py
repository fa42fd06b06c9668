"""Are members mixed by gates? Modules alike that stand side by side are no mixture; what becomes of their results says.

A member's result is replaced by not-a-numbers, and what was computed from it shows in what the block does next: where
it meets the others' results, one element must come of several members, each multiplied by something that the block
computes from its input without them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from moec.frontends.torch.members import Member
from moec.frontends.torch.oplog import HOST_READ, Entry, Log, Site, slots
from moec.frontends.torch.replay import replay_all

_PRODUCTS = frozenset(
    {"mul", "mul_", "mm", "bmm", "mv", "dot", "addmm", "baddbmm", "addbmm", "addcmul", "addcmul_", "div", "div_"}
)
_LAYERS = frozenset({"linear", "mm", "bmm", "mv", "addmm", "addmv", "baddbmm", "convolution"})


def are_mixed(log: Log, site: Site, members: Sequence[Member]) -> bool:
    """Whether gates mix each of the members with others."""
    own = {i for member in members for i in member.entries}
    entries = [e for e in log.entries[site.start : site.end] if e.index not in own and e.op != HOST_READ]
    outs = {member.out: log.value(member.out, member.last + 1) for member in members}
    if any(value is None for value in outs.values()) or len(outs) < len(members):
        return False
    known = {slot: value for slot, value in outs.items() if value is not None}
    try:
        return all(_is_mixed(log, site, entries, known, slot) for slot in known)
    except (RuntimeError, ValueError, KeyError, TypeError, IndexError):
        return False  # the block's own operations do not run on such values


def _is_mixed(log: Log, site: Site, entries: Sequence[Entry], outs: Mapping[int, torch.Tensor], slot: int) -> bool:
    """Whether the first element that comes of this member and of another comes through a product with a gate."""
    indices = [entry.index for entry in entries]
    without = replay_all(log, indices, {**_cloned(outs), slot: torch.full_like(outs[slot], torch.nan)})
    others = {s: value.clone() if s == slot else torch.full_like(value, torch.nan) for s, value in outs.items()}
    rest = replay_all(log, indices, others)
    meeting = next((e for e in entries if any(_both(without, rest, s) for s in (*e.results, *e.writes))), None)
    if meeting is None:
        return False
    stop = dict.fromkeys(outs, site.start)
    behind = log.closure([(s, meeting.index) for s in meeting.reads], stop=stop, start=site.start)
    way = [log.entries[i] for i in sorted(behind)]
    touched = [entry for entry in way if any(_is_lost(without.get(s)) for s in entry.reads)]
    if any(entry.name in _LAYERS and any(map(log.param_of, entry.reads)) for entry in touched):
        return False  # another layer takes the result before it meets others
    for entry in (*touched, meeting):
        gates = [s for s in entry.reads if not _is_lost(without.get(s)) and not _is_lost(rest.get(s))]
        if entry.name in _PRODUCTS and any(_of_input(log, site, s, entry.index) for s in gates):
            return True
    return False


def _cloned(values: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    return {slot: value.clone() for slot, value in values.items()}


def _is_lost(value: torch.Tensor | None) -> bool:
    return value is not None and value.is_floating_point() and bool(value.isnan().any())


def _both(a: Mapping[int, torch.Tensor], b: Mapping[int, torch.Tensor], slot: int) -> bool:
    """Whether one element is lost with the member's result and with the others'."""
    one, other = a.get(slot), b.get(slot)
    if one is None or other is None or not one.is_floating_point() or one.shape != other.shape:
        return False
    return bool((one.isnan() & other.isnan()).any())


def _of_input(log: Log, site: Site, slot: int, at: int) -> bool:
    """Whether a value is computed from what the site was given."""
    given = {log.storages[s] for s in slots((site.args, site.kwargs))}
    behind = log.closure([(slot, at)])
    touched = {s for i in behind for s in log.entries[i].reads} | {slot}
    return any(log.storages[s] in given for s in touched)
