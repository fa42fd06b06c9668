"""What an expert does with its rows after its last product: a norm, named by values on separating rows.

R rows, N outputs of an expert.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from moec.frontends.torch.activation import constants
from moec.frontends.torch.coordinates import MOVES
from moec.frontends.torch.extent import Extent
from moec.frontends.torch.instances import Instance, NotLifted
from moec.frontends.torch.linears import view_of
from moec.frontends.torch.oplog import HOST_READ, Log
from moec.frontends.torch.replay import replay
from moec.weights import View

# What mixes the elements of a row: without one of these nothing is looked for behind the last product.
_MIXES = frozenset(
    [
        *("mean", "var", "var_mean", "std", "std_mean", "linalg_vector_norm", "norm"),
        *("native_layer_norm", "rms_norm", "_fused_rms_norm", "_softmax", "logsumexp"),
    ]
)
Places = tuple[int | None, int | None]
_SCALES = (1e-3, 0.05, 1.0, 30.0)


@dataclass(frozen=True)
class Norm:
    """The IR's `norm` with its attributes; `before`: the weight (plus `shift`) multiplies what is normalised."""

    kind: str
    eps: float
    shift: float = 0.0
    before: bool = False

    def __str__(self) -> str:
        weight = f", weight + {self.shift:g}" if self.shift else ""
        return f"{self.kind} norm (eps {self.eps:g}{weight}{', weight first' if self.before else ''})"

    def __call__(self, rows: torch.Tensor, w: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor:
        """rows [R, N], w [N], b [N] -> [R, N], in rows' dtype."""
        if w is not None and self.before:
            rows, w = rows * (w + self.shift), None
        if self.kind == "layer":
            rows = rows - rows.mean(-1, keepdim=True)
        rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + self.eps)
        rows = rows if w is None else rows * (w + self.shift)
        return rows if b is None else rows + b


@dataclass(frozen=True)
class Tail:
    """The entries behind an expert's last product that depend on nothing but its result and on parameters."""

    entries: tuple[int, ...]
    end: int
    vectors: tuple[View, ...]


def with_tail(log: Log, instance: Instance, params: dict[str, torch.Tensor], axis: int = -1) -> Instance:
    """The instance, its tail included where that does more than to rearrange or to scale. Raises NotLifted.

    `axis` is where the outputs lie in the last product's result.
    """
    tail = find_tail(log, instance, params, log.tensors[instance.out].shape[axis])
    return instance if tail is None else replace(instance, tail=tail.entries, end=tail.end, vectors=tail.vectors)


def find_tail(log: Log, instance: Instance, params: dict[str, torch.Tensor], width: int) -> Tail | None:
    """The tail of an instance, None where it mixes no row."""
    start = (instance.down or instance.ups[-1]).last
    known, own, vectors = {instance.out}, list[int](), list[View]()
    end = instance.out
    made_here: set[int] = set()
    todo, asked = [e.index for e in log.consumers(instance.out)], set[int]()
    while todo:  # in the order of the run; what reads a value that is no part of the tail is none either
        entry = log.entries[heapq.heappop(todo)]
        if entry.index <= start or entry.index in asked:
            continue
        asked.add(entry.index)
        others = [s for s in entry.reads if s not in known]
        behind = [_fixed(log, s, entry.index, start + 1) for s in others] if entry.op != HOST_READ else [None]
        if None in behind or {log.storages[s] for s in entry.writes} - made_here:
            continue
        computing = {entry.index}.union(*(found for found in behind if found))
        for slot in entry.results:
            if slot not in known:
                known.add(slot)
                for reader in log.consumers(slot):
                    heapq.heappush(todo, reader.index)
        made_here |= {log.storages[s] for s in entry.results} - {log.storages[s] for s in entry.reads}
        own += computing
        for index in sorted(i for i in computing if log.entries[i].name not in MOVES):
            vectors += [v for s in log.entries[index].reads if (v := view_of(log, s, params)) is not None]
        made = log.tensors[entry.results[0]] if entry.results else None
        if made is not None and made.numel() == log.tensors[instance.out].numel() and made.shape[-1] == width:
            end = entry.results[0]
    if not any(log.entries[i].name in _MIXES for i in own):
        return None
    if any(len(view.shape) != 1 for view in vectors):
        raise NotLifted("what follows the experts' layers reads a parameter that is no vector")
    return Tail(tuple(sorted({i for i in own if i <= (log.producer(end) or 0)})), end, tuple(dict.fromkeys(vectors)))


def _fixed(log: Log, slot: int, at: int, start: int) -> set[int] | None:
    """The entries from `start` on that make a value of parameters and numbers alone; None where it is made of more."""
    behind: set[int] = set()
    leaves: set[int] = set()
    todo: list[tuple[int, int, Extent | None]] = [(slot, at, None)]
    while todo:
        current, moment, within = todo.pop()
        if any(i >= start for i in log.writers(current, moment, within)):
            return None
        made = log.producer(current)
        if made is None or not start <= made < moment:
            leaves.add(current)
        elif made not in behind:
            entry, part = log.entries[made], within or log.extent(current)
            if entry.op == HOST_READ or entry.writes:
                return None
            behind.add(made)
            # Of what a view is taken from, only the part that the view shows matters.
            todo += [(s, made, part if log.storages[s] == log.storages[current] else None) for s in entry.reads]
    fixed = all(
        log.param_of(s) is not None or (log.tensors[s].numel() == 1 and log.producer(s) is None) for s in leaves
    )
    return behind if fixed and leaves else None


def name_tail(log: Log, instance: Instance, read: Sequence[torch.Tensor], axis: int = -1) -> tuple[Norm, Places]:
    """The norm that the tail computes, and the positions of its weight and its bias among the vectors it reads.

    Raises NotLifted with the operations where it has no name.
    """
    # An eps may have gone through fp32 on its way.
    numbers = sorted({0.0, *(float(f"{n:.6g}") for n in constants(log, instance.tail))})
    width = log.tensors[instance.last_product.out].shape[axis]
    generator = torch.Generator().manual_seed(3)
    questions = [torch.randn(width, generator=generator) * scale + scale / 3 for scale in _SCALES]
    answers = [_ask(log, instance, question, axis) for question in questions]
    precise = log.tensors[instance.out].dtype in (torch.float32, torch.float64)
    vectors = [v.float().cpu() for v in read]
    for norm, chosen in _candidates(numbers, len(vectors)):
        w, b = (vectors[i] if i is not None else None for i in chosen)
        mine = [norm(question, w, b) for question in questions]
        if all(_near(m, a, 1e-5 if precise else 2e-2) for m, a in zip(mine, answers, strict=True)):
            return norm, chosen
    ops = ", ".join(log.entries[i].name for i in instance.tail[:8])
    raise NotLifted(f"the operations behind the experts' layers have no name here: {ops}")


def _candidates(numbers: Sequence[float], vectors: int) -> Iterator[tuple[Norm, Places]]:
    """Norms with the positions of weight and bias among the vectors; every vector has a part."""
    by_number: dict[int, list[Places]] = {0: [(None, None)], 1: [(0, None), (None, 0)], 2: [(0, 1), (1, 0)]}
    places = by_number.get(vectors, [])
    for kind, eps, (w, b) in itertools.product(("rms", "layer"), numbers, places):
        for shift, before in itertools.product((0.0, 1.0), (False, True)):
            if w is not None or (not shift and not before):
                yield Norm(kind, eps, shift, before), (w, b)


def _near(mine: torch.Tensor, theirs: torch.Tensor, bar: float) -> bool:
    return bool((mine - theirs.float()).norm() <= bar * theirs.float().norm())


def _ask(log: Log, instance: Instance, vector: torch.Tensor, axis: int) -> torch.Tensor:
    """What the recorded tail makes of one row, which stands in every row."""
    like = log.tensors[instance.last_product.out]
    shape = [1] * like.dim()
    shape[axis] = -1
    given = {instance.last_product.out: vector.to(like.device, torch.float32).reshape(shape).expand(like.shape).clone()}
    try:
        answer = replay(log, instance.tail, given, instance.out)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise NotLifted(f"the operations behind the experts' layers cannot be run again: {error}") from error
    rows = answer.reshape(-1, answer.shape[-1])
    if not rows.shape[0] or not torch.allclose(rows, rows[:1].expand(rows.shape), rtol=1e-5, atol=1e-6):
        raise NotLifted("equal rows of an expert get different results")
    return rows[0].cpu()
