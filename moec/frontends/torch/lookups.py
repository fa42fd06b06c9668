"""Experts of one hidden unit whose two vectors are rows of tables, looked up by id: retrieval, as with product keys.

y[t] = sum over k of w[t, k] * act(x[t] . a[e[t, k]]) * b[e[t, k]] is a mixture with a hidden width of one and very
many experts. As grouped products each chosen pair would be a group of its own; code that looks rows up is found here,
and left alone with that reason. T tokens, K experts a token, E experts, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import permutations

import torch
from torch import nn

from moec.frontends.torch.coordinates import MOVES
from moec.frontends.torch.discover import Candidate
from moec.frontends.torch.observe import Drivers, ProbeFailed
from moec.frontends.torch.oplog import Entry, Log, Ref

_LOOKUPS = ("embedding", "index", "index_select")
_PRODUCTS = frozenset({"bmm", "mm", "baddbmm", "addmm", "mul"})


def discover_lookups(model: nn.Module) -> Iterator[Candidate]:
    """Modules that hold at least two embeddings of one shape."""
    for name, module in model.named_modules():
        lead = f"{name}." if name else ""
        tables: dict[torch.Size, set[str]] = {}
        for key, child in module.named_children():
            if isinstance(child, nn.Embedding):
                tables.setdefault(child.weight.shape, set()).add(f"{lead}{key}.weight")
        for weights in tables.values():
            if len(weights) > 1:
                yield Candidate(name, "moe", weights)


def looked_up(candidate: Candidate, drivers: Drivers, params: Mapping[str, torch.Tensor]) -> str | None:
    """Why the candidate's experts are left alone, None where it holds no experts of one hidden unit."""
    weights = [params[name] for name in sorted(candidate.weights)]
    for driver in drivers.drivers(candidate.name, [weights[0].shape[1]], weights[0].dtype, weights[0].device):
        try:
            log, _ = driver.observe()
        except ProbeFailed as failure:
            drivers.failed(driver, failure)
            continue
        found = _pair(log, candidate.weights)
        if found is None:
            return None
        first, second = found
        return (
            f"{weights[0].shape[0]} experts of one hidden unit each, the rows of {first!r} and {second!r} for the same "
            "ids: as grouped products each would be a group of its own, slower than looking rows up as the code does"
        )
    return None


def _pair(log: Log, weights: set[str]) -> tuple[str, str] | None:
    """The tables a and b of experts b[i] * act(x . a[i]), by how their rows are used."""
    rows = {name: entry for entry in log.entries if (name := _table(log, entry, weights)) is not None}
    for first, second in permutations(sorted(rows), 2):
        if rows[first].reads[1:] != rows[second].reads[1:]:
            continue
        scores, sums = (_product(log, rows[name]) for name in (first, second))
        if scores is None or sums is None or scores.index >= sums.index:
            continue
        behind = log.closure([(slot, sums.index) for slot in sums.reads], start=rows[first].index)
        width = log.tensors[rows[first].results[0]].shape[-1]
        # The first product sums over a row's elements, the second over rows: it gives rows again.
        contracts = log.tensors[scores.results[0]].numel() * width == log.tensors[rows[first].results[0]].numel()
        if scores.index in behind and contracts and log.tensors[sums.results[0]].numel() % width == 0:
            return first, second
    return None


def _table(log: Log, entry: Entry, weights: set[str]) -> str | None:
    """The table whose rows the entry looks up by ids that the block computed."""
    if entry.name not in _LOOKUPS or not entry.args or not isinstance(entry.args[0], Ref) or len(entry.reads) < 2:
        return None
    name = log.param_of(entry.args[0].slot)
    return name if name in weights else None


def _product(log: Log, lookup: Entry) -> Entry | None:
    """The one product that uses the rows, which are only moved on the way."""
    users = log.users_behind(lookup.results[0], lookup.index, MOVES)
    return users[0] if len(users) == 1 and users[0].name in _PRODUCTS else None
