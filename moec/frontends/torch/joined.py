"""Loops over experts whose rows lie in one tensor: split by expert, multiplied one by one, joined again.

A layer of such experts is one product of sorted rows with a stack of matrices, however the loop is written: the sorted
rows are split or sliced, the results concatenated or written into slices of one tensor. R rows, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from moec.frontends.torch.banks import complete
from moec.frontends.torch.batched import Product
from moec.frontends.torch.coordinates import Line
from moec.frontends.torch.instances import NotLifted
from moec.frontends.torch.linears import Linear
from moec.frontends.torch.oplog import Entry, Log
from moec.weights import View

_PARTS = frozenset({"split", "split_with_sizes", "chunk", "slice", "narrow", "tensor_split", "unsafe_split"})


def joined_products(
    log: Log, linears: Sequence[Linear], module: torch.nn.Module, prefix: str, params: Mapping[str, torch.Tensor]
) -> list[Product] | None:
    """The products of loops over experts, one for each of their layers; None when the linears are no such loops."""
    groups: dict[tuple[int, int], list[Linear]] = {}
    for linear in linears:
        source, join = _whole(log, linear), _join(log, linear)
        if source is None or join is None:
            return None
        groups.setdefault((source, join.index), []).append(linear)
    if not 1 < len(groups) <= 3 or min(map(len, groups.values())) < 2:
        return None
    return [_product(log, group, *key, module, prefix, params) for key, group in groups.items()]


def _whole(log: Log, linear: Linear) -> int | None:
    """The tensor that the linear's rows are a part of."""
    made = log.producer(linear.source)
    entry = log.entries[made] if made is not None else None
    return entry.reads[0] if entry is not None and entry.name in _PARTS else None


def _join(log: Log, linear: Linear) -> Entry | None:
    """The concatenation that takes the linear's result, or the copy of it into a slice of one tensor."""
    users = [entry for entry in log.consumers(linear.out) if entry.index > linear.last]
    if len(users) != 1:
        return None
    if users[0].name == "cat":
        return users[0]
    if users[0].name != "copy_":
        return None
    storage = log.storages[users[0].reads[0]]
    last = [e for e in log.entries if e.name == "copy_" and e.reads and log.storages[e.reads[0]] == storage][-1]
    return last if last.results else None


def _product(
    log: Log,
    group: Sequence[Linear],
    source: int,
    join: int,
    module: torch.nn.Module,
    prefix: str,
    params: Mapping[str, torch.Tensor],
) -> Product:
    out = _joined_out(log, join)
    rows, results = log.value(source, group[0].entry), log.value(out, join + 1)
    if not _in_order(log, [g.source for g in group], rows) or not _in_order(log, [g.out for g in group], results):
        raise NotLifted("the rows of a loop over experts are not the parts of one tensor in order")
    owned = dict(params)
    bank = complete([g.weight for g in group], module, prefix, owned)
    biases = [g.bias for g in group if g.bias is not None]
    if biases and len(biases) != len(group):
        raise NotLifted("experts differ: some have a bias")
    bias = complete(biases, module, prefix, owned) if biases else None
    position = {view: e for e, view in enumerate(bank)}
    asked = [position[g.weight] for g in group if log.tensors[g.source].numel()]
    if asked != sorted(set(asked)):
        raise NotLifted("a loop over experts runs one of them twice, or not in order")
    outputs, inputs = bank[0].shape
    linear = Linear(group[0].entry, source, bank[0], bias[0] if bias else None, out, join)
    ends = (Line.even(0, 1, inputs), Line.even(0, 1, outputs))
    return Product(linear, bank, _aligned(bank, bias), *ends, -1, -1, frozenset(asked))


def _in_order(log: Log, parts: Sequence[int], whole: torch.Tensor | None) -> bool:
    values = [value for slot in parts if (value := log.value(slot)) is not None]
    return whole is not None and len(values) == len(parts) and torch.equal(torch.cat(values), whole)


def _aligned(bank: Sequence[View], bias: tuple[View, ...] | None) -> tuple[View, ...] | None:
    if bias is not None and len(bias) != len(bank):
        raise NotLifted("weights are for different numbers of experts")
    return bias


def _joined_out(log: Log, join: int) -> int:
    """The whole tensor after the join: the concatenation, or the tensor whose slices were written."""
    entry = log.entries[join]
    if entry.name == "cat":
        return entry.results[0]
    storage = log.storages[entry.reads[0]]
    made = next(e for e in log.entries if any(log.storages[s] == storage for s in e.results))
    return made.results[0]
