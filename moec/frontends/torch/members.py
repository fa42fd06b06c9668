"""The members of a dense mixture: modules alike that each take rows and give rows, wherever their lists stand.

Nothing is asked of where rows come from and where results go, so members of several levels, or of lists within lists,
are found in one log. R rows, N outputs of a member.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from moec.frontends.torch.banks import Bank
from moec.frontends.torch.body import Body, build_body
from moec.frontends.torch.chain import build_chain, is_batch_norm
from moec.frontends.torch.instances import Instance, NotLifted, roles, signature
from moec.frontends.torch.linears import Linear
from moec.frontends.torch.oplog import Log

# A tower of more layers than this is a network of its own.
_MOST_LAYERS = 4


@dataclass(frozen=True)
class Member:
    """Products layer by layer (the first may be two, gate and up), and the entries between one layer and the next."""

    layers: tuple[tuple[Linear, ...], ...]
    middles: tuple[tuple[int, ...], ...]

    @property
    def source(self) -> int:
        return self.layers[0][0].source

    @property
    def first(self) -> int:
        return min(linear.entry for linear in self.layers[0])

    @property
    def out(self) -> int:
        return self.layers[-1][0].out

    @property
    def last(self) -> int:
        return self.layers[-1][0].last

    @property
    def entries(self) -> tuple[int, ...]:
        """Indices of all its entries."""
        products = (i for layer in self.layers for linear in layer for i in (linear.entry, linear.last))
        return tuple(sorted({*products, *(i for middle in self.middles for i in middle)}))

    def as_instance(self, log: Log) -> Instance:
        """Its first layers and its last, with all between them as one middle."""
        if len(self.layers) == 1:
            return Instance(self.layers[0], None, ())
        ends = {i for linear in (*self.layers[0], *self.layers[-1]) for i in (linear.entry, linear.last)}
        return Instance(self.layers[0], self.layers[-1][0], tuple(i for i in self.entries if i not in ends))


@dataclass(frozen=True)
class Stage:
    """Members that do the same operations and none of which needs another's result, with their common body."""

    members: tuple[Member, ...]
    body: Body

    @property
    def entries(self) -> tuple[int, ...]:
        return tuple(sorted({i for member in self.members for i in member.entries}))


def find_members(log: Log, linears: Sequence[Linear]) -> list[Member]:
    """Chains of products in which each reads nothing but the result of the one before, in the order they ran."""
    stop = {linear.out: linear.last for linear in linears}
    position = {linear.out: i for i, linear in enumerate(linears)}
    feeds: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    times = [0] * len(linears)
    for i, linear in enumerate(linears):
        middle = tuple(sorted(log.closure([(linear.source, linear.entry)], stop=stop)))
        touched = {slot for e in middle for slot in log.entries[e].reads} | {linear.source}
        sources = tuple(sorted(position[slot] for slot in touched if slot in position))
        for j in sources:
            times[j] += 1
        feeds[i] = sources, middle
    found: list[Member] = []
    ends: dict[int, int] = {}
    for i, linear in enumerate(linears):
        sources, middle = feeds[i]
        if sources and all(times[j] == 1 for j in sources) and _alone(log, [linears[j] for j in sources], middle):
            before = [ends.get(j) for j in sources]
            joined = _joined(found, before, [linears[j] for j in sources])
            if joined is not None and len(joined.layers) < _MOST_LAYERS:
                for place in sorted({place for place in before if place is not None}, reverse=True):
                    found.pop(place)
                    ends = {end: at - (at > place) for end, at in ends.items() if at != place}
                ends[i] = len(found)
                found.append(Member((*joined.layers, (linear,)), (*joined.middles, middle)))
                continue
        ends[i] = len(found)
        found.append(Member(((linear,),), ()))
    return sorted(found, key=lambda member: member.first)


def _joined(found: Sequence[Member], before: Sequence[int | None], sources: Sequence[Linear]) -> Member | None:
    """The one member that ends in the sources; two products of the same rows become one with two first layers."""
    if any(place is None for place in before):
        return None
    members = [found[place] for place in before if place is not None]
    if len(members) == 1:
        return members[0]
    pair = len(members) == 2 and all(len(member.layers) == 1 == len(member.layers[0]) for member in members)
    return Member((tuple(sources),), ()) if pair and sources[0].source == sources[1].source else None


def _alone(log: Log, sources: Sequence[Linear], middle: Sequence[int]) -> bool:
    """Whether the entries read the sources' results, numbers, and what a batch norm keeps, and nothing else."""
    known = {source.out for source in sources}
    for index in middle:
        entry = log.entries[index]
        for slot in entry.reads:
            number = log.param_of(slot) is None and log.tensors[slot].numel() == 1 and log.producer(slot) is None
            if slot not in known and not number and not (is_batch_norm(entry) and log.param_of(slot) is not None):
                return False
        known.update(entry.results)
    return True


def stages(log: Log, members: Sequence[Member], params: Mapping[str, torch.Tensor]) -> list[Stage]:
    """Members by depth and by what they do, where at least two do the same; those without a name are left out."""
    depth = _depths(log, members)
    groups: list[tuple[int, list[Member]]] = []
    for level, member in zip(depth, members, strict=True):
        mine = member.as_instance(log)
        for other_level, group in groups:
            first = group[0].as_instance(log)
            if level == other_level and _shapes(log, member) == _shapes(log, group[0]):  # noqa: SIM102
                if signature(log, mine).same(signature(log, first)):
                    group.append(member)
                    break
        else:
            groups.append((level, [member]))
    found = []
    for _, group in groups:
        body = _body(log, group, params) if len(group) > 1 else None
        if body is not None:
            found.append(Stage(tuple(group), body))
    return found


def _shapes(log: Log, member: Member) -> tuple[object, ...]:
    weights = tuple((linear.weight.shape, linear.bias is not None) for layer in member.layers for linear in layer)
    return (log.tensors[member.source].shape, weights, tuple(map(len, member.layers)))


def _depths(log: Log, members: Sequence[Member]) -> list[int]:
    """For each member, how many others stand one behind another before it."""
    found: list[int] = []
    for i, member in enumerate(members):
        behind = log.closure([(member.source, member.first)])
        before = [found[j] for j in range(i) if members[j].layers[-1][0].entry in behind]
        found.append(1 + max(before, default=-1))
    return found


def _body(log: Log, group: Sequence[Member], params: Mapping[str, torch.Tensor]) -> Body | None:
    """The members' common body, None where it has no name."""
    first = group[0]
    try:
        if len(first.layers) > 2 or any(is_batch_norm(log.entries[i]) for m in first.middles for i in m):
            return build_chain(log, [(member.layers, member.middles) for member in group], params)
        instances = [member.as_instance(log) for member in group]
        named = [roles(instance) for instance in instances]
        banks = [Bank(role, tuple(views[role] for views in named)) for role in named[0]]
        return build_body(log, instances, banks, params)
    except NotLifted:
        return None
