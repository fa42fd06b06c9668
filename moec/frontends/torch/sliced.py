"""The sliced cut: a block's own operations up to x, experts and weights, the experts, and its own from y on."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moec.frontends.torch.binding import Binder
from moec.frontends.torch.body import Body
from moec.frontends.torch.dropped import check_replaced, check_writes
from moec.frontends.torch.instances import NotLifted
from moec.frontends.torch.items import Blocks, Item, needed
from moec.frontends.torch.observe import is_tokens
from moec.frontends.torch.oplog import HOST_READ, Ref, slots
from moec.frontends.torch.program import Aligned, Step
from moec.frontends.torch.sizes import Size, solve
from moec.frontends.torch.solve import Solution
from moec.frontends.torch.straight import Straight, used_by, write_out

# They take sizes from what they read, no values.
_SHAPE_ONLY = frozenset(name for fill in ("zeros", "ones", "full", "empty") for name in (f"{fill}_like", f"new_{fill}"))


@dataclass(frozen=True)
class More:
    """A tensor that the block takes beside its tokens, such as a mask; its sizes follow from those of the tokens."""

    name: str
    slot: int
    shape: tuple[int | Size, ...]
    dtype: torch.dtype

    def sizes(self, dims: Sequence[int]) -> tuple[int, ...]:
        """Its shape beside tokens of these sizes."""
        return tuple(n if isinstance(n, int) else n(dims) for n in self.shape)


@dataclass(frozen=True)
class Slice:
    """`before` runs, the experts on x, selector and weights give y, `after` runs; the block returns `result`."""

    x_name: str
    others: Mapping[str, Any]
    before: tuple[Step, ...]
    after: tuple[Step, ...]
    x: Any
    selector: Any
    weights: Any
    y_slot: int
    y_shape: tuple[Any, ...]
    y_dtype: torch.dtype
    input_slot: int
    result: Any
    more: tuple[More, ...] = ()

    @functools.cached_property
    def carried(self) -> tuple[int, ...]:
        """Slots made before the experts that are read after them."""
        return tuple(sorted(used_by(self.after, self.result) - {self.input_slot, self.y_slot}))

    @functools.cached_property
    def to_experts(self) -> Straight:
        """(module, dims, input, *more) -> x, selector, weights, the shape of y, and the tensors of `carried`."""
        carried, takes = tuple(map(Ref, self.carried)), (self.input_slot, *(m.slot for m in self.more))
        return write_out(self.before, takes, (self.x, self.selector, self.weights, self.y_shape, carried))

    @functools.cached_property
    def from_experts(self) -> Straight:
        """(module, dims, input, y, *carried, input as it was given) -> what the block returns, which may be that."""
        takes = (self.input_slot, self.y_slot, *self.carried)
        return write_out(self.after, takes, self.result, anew=self.input_slot)

    @property
    def kept(self) -> tuple[str, ...]:
        """Submodules that stay calls."""
        return tuple(step.path for step in (*self.before, *self.after) if step.path is not None)

    @property
    def around(self) -> tuple[str, ...]:
        """The block's own operations, with "experts" where those are."""
        return (*(s.text for s in self.before), "experts", *(s.text for s in self.after))


def slice_block(
    parts: Sequence[Blocks], found: Solution, outs: Sequence[int | None], body: Body, named: Collection[int]
) -> Slice:
    """The slice that holds for all the logs in `parts`. Raises NotLifted with the reason.

    The solution is for the first log; `outs` are the tensors the experts end in.
    """
    main = parts[0]
    log, site = main.log, main.site
    name, dims, more = inputs_of(parts)
    heads = [(s, main.first) for s in (found.x, found.selector, found.weights) if s is not None]
    ends = [(s, site.end) for s in slots(site.result)]
    y = (found.y, found.complete)
    kept = needed(main, ends, y)
    ahead = needed(main, heads)
    if kept is None or ahead is None:
        raise NotLifted("the block's result needs values computed among its experts")
    chosen = {item.start: item for item in [*kept, *ahead]}
    kept_entries = {i for item in chosen.values() for i in range(item.start, item.end)}
    dropped = set(range(site.start, site.end)) - kept_entries
    check_replaced(log, (found.y, found.complete + 1), dropped, named, body.params, site.start)
    check_writes(log, site.start, site.end, site.label or "the model")
    check_reads(main, frozenset(found.routing))
    before = [chosen[i] for i in sorted(chosen) if i < main.first]
    after = [chosen[i] for i in sorted(chosen) if i >= main.first]
    aligned = Aligned([p.log for p in parts], dims, site.path)
    aligned.tie([(p.site.args, p.site.kwargs) for p in parts])
    first = tuple(aligned.step(_counterparts(parts, item)) for item in before)
    x, selector, weights = (
        None if s is None else aligned.tree([Ref(t) for t in _matching(aligned, s)], "experts")
        for s in (found.x, found.selector, found.weights)
    )
    y_slots = _y_slots(parts, aligned, found, outs)
    shapes = [tuple(p.log.tensors[s].shape) for p, s in zip(parts, y_slots, strict=True)]
    aligned.match[found.y] = {tuple(y_slots): None}
    second = tuple(aligned.step(_counterparts(parts, item)) for item in after)
    result = aligned.tree([p.site.result for p in parts], "the block's result")
    bound = Binder(getattr(site.module, site.method))(site.args, site.kwargs)
    others = {k: v for k, v in bound.items() if k not in (name, *(m.name for m in more))}
    # Where rows are placed by position, the shape of y follows from that of x.
    y_shape = () if found.places is not None else tuple(aligned.tree(shapes, "y"))
    y_dtype = log.tensors[found.y].dtype
    return Slice(
        name, others, first, second, x, selector, weights, found.y, y_shape, y_dtype, bound[name].slot, result, more
    )


def _matching(aligned: Aligned, slot: int) -> tuple[int, ...]:
    if slot not in aligned.match:
        raise NotLifted("x, experts or weights are not computed by the block itself")
    return next(reversed(aligned.match[slot]))


def tokens_of(part: Blocks) -> tuple[str, tuple[int, ...]]:
    """Name and shape of the tokens among the block's arguments: the first float tensor [T, D] or [B, S, D]."""
    site = part.site
    bound = Binder(getattr(site.module, site.method))(site.args, site.kwargs)
    for name, value in bound.items():
        if isinstance(value, Ref) and is_tokens(part.log.tensors[value.slot]):
            return name, tuple(part.log.tensors[value.slot].shape)
    found = [part.log.tensors[slot] for slot in slots((site.args, site.kwargs))]
    if len(found) == 1:
        return next(n for n, v in bound.items() if isinstance(v, Ref)), tuple(found[0].shape)
    raise NotLifted(f"the block takes {len(found)} tensors, and none of them is tokens")


def inputs_of(parts: Sequence[Blocks]) -> tuple[str, list[tuple[int, ...]], tuple[More, ...]]:
    """The tokens' name, their shape in each log, and the other tensors that the block takes."""
    found = [tokens_of(part) for part in parts]
    name, dims = found[0][0], [shape for _, shape in found]
    more: list[More] = []
    binder = Binder(getattr(parts[0].site.module, parts[0].site.method))
    given = [binder(p.site.args, p.site.kwargs) for p in parts]
    names = [n for n, v in given[0].items() if isinstance(v, Ref)]
    if any(len(slots((p.site.args, p.site.kwargs))) != len(names) for p in parts):
        raise NotLifted("the block takes tensors within other arguments")
    for other in names:
        if other == name:
            continue
        if not all(isinstance(bound.get(other), Ref) for bound in given):
            raise NotLifted(f"the block takes {other} at some shapes only")
        shapes = [tuple(p.log.tensors[bound[other].slot].shape) for p, bound in zip(parts, given, strict=True)]
        sizes = [solve(same, dims) for same in zip(*shapes, strict=False)]
        if len(set(map(len, shapes))) != 1 or any(size is None for size in sizes):
            raise NotLifted(f"the shape of {other} does not follow from that of the tokens")
        tensor = parts[0].log.tensors[given[0][other].slot]
        more.append(More(other, given[0][other].slot, tuple(s for s in sizes if s is not None), tensor.dtype))
    return name, dims, tuple(more)


def check_reads(blocks: Blocks, choice: frozenset[int]) -> None:
    """A value read on the host steers Python code that the slice no longer runs: only the experts' choice may."""
    log = blocks.log
    inside = {i for item in blocks.items if item.site is not None for i in range(item.start, item.end)}
    for entry in log.entries[blocks.site.start : blocks.site.end]:
        if entry.op != HOST_READ or entry.index in inside:
            continue
        for slot in entry.reads:
            if not _from_choice(blocks, choice, slot, entry.index):
                shape = tuple(log.tensors[slot].shape)
                raise NotLifted(f"the block's code reads a tensor of shape {shape} on the host and may branch on it")


def _from_choice(blocks: Blocks, choice: frozenset[int], slot: int, at: int) -> bool:
    """True if the value comes from the tensors in `choice` alone, looking no further than those."""
    log = blocks.log
    given = slots((blocks.site.args, blocks.site.kwargs))
    seen: set[int] = set()
    todo = [(slot, at)]
    while todo:
        current, moment = todo.pop()
        if current in choice:
            continue
        if current in given:
            return False
        made = log.producer(current)
        sources = [*log.writers(current, moment), *([made] if made is not None else [])]
        if not sources and (log.tensors[current].is_floating_point() or log.param_of(current) is not None):
            return False
        for index in sources:
            if index < blocks.site.start:
                return False
            if index not in seen and log.entries[index].name not in _SHAPE_ONLY:
                seen.add(index)
                todo += [(read, index) for read in log.entries[index].reads]
    return True


def _counterparts(parts: Sequence[Blocks], item: Item) -> list[Item]:
    """The item in each log: by position from the front before the experts, from the back after them."""
    main = parts[0]
    position = next((i for i, p in enumerate(main.prefix) if p.start == item.start), None)
    from_end = (
        None
        if position is not None
        else len(main.suffix) - next(i for i, s in enumerate(main.suffix) if s.start == item.start)
    )
    same = []
    for part in parts:
        items = part.prefix if position is not None else part.suffix
        index = position if position is not None else len(items) - from_end  # type: ignore[operator]
        if not 0 <= index < len(items):
            raise NotLifted("the block does different operations at different shapes")
        same.append(items[index])
    return same


def _y_slots(parts: Sequence[Blocks], aligned: Aligned, found: Solution, outs: Sequence[int | None]) -> list[int]:
    """The slot of y in each log."""
    if found.y == outs[0]:
        return [out for out in outs if out is not None]
    if found.y in aligned.match:
        return list(_matching(aligned, found.y))
    main = parts[0]
    made = next((i for i in main.items if found.y in i.results), None)
    if made is None:
        raise NotLifted("the experts' result is made among the experts")
    where = made.results.index(found.y)
    return [item.results[where] for item in _counterparts(parts, made)]
