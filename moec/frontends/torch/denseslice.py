"""The cut of a dense mixture: a block's own operations in segments, and between them stages of members at once.

The members of a stage take tensors of one shape and each gives one of its own, which the block goes on with: gates,
sums and whatever follows a member's last layer are its own operations. T tokens, D inputs, O outputs of a member.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moec.frontends.torch.binding import Binder
from moec.frontends.torch.calls import Executable, check_more, check_others, check_tokens
from moec.frontends.torch.dropped import check_replaced, check_writes
from moec.frontends.torch.ids import Ids
from moec.frontends.torch.instances import NotLifted
from moec.frontends.torch.items import Blocks, Item, needed, outside
from moec.frontends.torch.members import Stage
from moec.frontends.torch.oplog import Log, Ref, Site, slots
from moec.frontends.torch.program import Aligned, Step
from moec.frontends.torch.routing import FORMS
from moec.frontends.torch.sliced import More, check_reads, inputs_of
from moec.frontends.torch.straight import Straight, used_by, write_out


@dataclass(frozen=True)
class Joint:
    """One stage at run time: slots of its members' rows and of their results, and how wide both are."""

    xs: tuple[int, ...]
    ys: tuple[int, ...]
    level: int
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Segment:
    """Steps between two levels of stages; `takes` are made before, `gives` are read later."""

    steps: tuple[Step, ...]
    takes: tuple[int, ...]
    gives: tuple[int, ...]

    @functools.cached_property
    def run(self) -> Straight:
        """(module, dims, *takes) -> gives."""
        return write_out(self.steps, self.takes, tuple(map(Ref, self.gives)))


@dataclass(frozen=True)
class DenseSlice:
    """A segment before each level of stages, the steps behind the last, and the block's result."""

    x_name: str
    others: Mapping[str, Any]
    more: tuple[More, ...]
    input_slot: int
    stages: tuple[Joint, ...]
    segments: tuple[Segment, ...]
    after: tuple[Step, ...]
    result: Any

    @functools.cached_property
    def last_takes(self) -> tuple[int, ...]:
        """What the steps behind the last stage read of what is there before."""
        return tuple(sorted(used_by(self.after, self.result)))

    @functools.cached_property
    def finish(self) -> Straight:
        """(module, dims, *last_takes, input as it was given) -> what the block returns, which may be that."""
        return write_out(self.after, self.last_takes, self.result, anew=self.input_slot)

    @property
    def steps(self) -> tuple[Step, ...]:
        return (*(step for segment in self.segments for step in segment.steps), *self.after)

    @property
    def kept(self) -> tuple[str, ...]:
        """Submodules that stay calls."""
        return tuple(step.path for step in self.steps if step.path is not None)

    @property
    def around(self) -> tuple[str, ...]:
        """The block's own operations, with "experts" where those are."""
        own = [[*(step.text for step in segment.steps), "experts"] for segment in self.segments]
        return (*(text for part in own for text in part), *(step.text for step in self.after))


@dataclass(frozen=True)
class DenseCall:
    """A block whose stages of members run at once; the executable has three inputs and one output for each stage."""

    binder: Binder
    sliced: DenseSlice
    rank: int
    dtype: torch.dtype
    width: int
    ids: Ids | None = None

    def __call__(
        self, module: torch.nn.Module, executable: Executable, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        s = self.sliced
        bound = self.binder(args, kwargs)
        given = bound.pop(s.x_name, None)
        x = check_tokens(given, (self.rank,), self.dtype, self.width)
        more = {m.slot: check_more(bound.pop(m.name, None), m, x.shape).contiguous() for m in s.more}
        check_others(bound, s.others)
        env = {s.input_slot: x.contiguous(), **more}
        for level, segment in enumerate(s.segments):
            made = segment.run(module, x.shape, *(env[slot] for slot in segment.takes))
            env.update(zip(segment.gives, made, strict=True))
            self._experts(level, env, executable)
        return s.finish(module, x.shape, *(env[slot] for slot in s.last_takes), given)

    def _experts(self, level: int, env: dict[int, torch.Tensor], executable: Executable) -> None:
        """Put the results of all stages of a level into `env`; the other stages of the executable get no rows."""
        inputs: list[torch.Tensor] = []
        for stage in self.sliced.stages:
            if stage.level == level:
                rows = _rows([env[slot] for slot in stage.xs])
                inputs += [rows, *FORMS["places"](None, rows, rows.shape[0], len(stage.xs), 1)]
                continue
            like = env[self.sliced.input_slot]
            none = like.new_empty(0, stage.inputs)
            inputs += [none, *FORMS["places"](None, none, 0, len(stage.xs), 1)]
        for stage, y in zip(self.sliced.stages, executable(*inputs), strict=True):
            if stage.level == level:
                like = env[stage.xs[0]]
                each = y.to(like.dtype).view(len(stage.ys), *like.shape[:-1], stage.outputs)
                env.update(zip(stage.ys, each.unbind(0), strict=True))


def _rows(xs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors [.., D] -> [E * T, D], the first one's rows first."""
    first = xs[0]
    if all(x is first for x in xs):
        return first.expand(len(xs), *first.shape).reshape(-1, first.shape[-1])
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in xs])


def slice_dense(site: Site, logs: Sequence[tuple[Log, Site, Sequence[Sequence[Stage]]]]) -> DenseSlice:
    """The slice that holds for all logs, each with its site and its stages level by level.

    Raises NotLifted with the reason.
    """
    parts = [outside(log, here, _entries(levels)) for log, here, levels in logs]
    main, levels = parts[0], logs[0][2]
    log = main.log
    if any([item.name for item in part.items] != [item.name for item in main.items] for part in parts):
        raise NotLifted("the block does different operations at different shapes")
    name, dims, more = inputs_of(parts)
    chosen = _segments(main, levels)
    _check_replaced(main, levels, [item for segment in chosen for item in segment])
    check_writes(log, site.start, site.end, site.label or "the model")
    check_reads(main, frozenset())
    _check_order(log, chosen)
    aligned = Aligned([part.log for part in parts], dims, site.path)
    aligned.tie([(part.site.args, part.site.kwargs) for part in parts])
    place = {item.start: i for i, item in enumerate(main.items)}
    steps: list[tuple[Step, ...]] = []
    for level in range(len(levels) + 1):
        steps.append(tuple(aligned.step([p.items[place[item.start]] for p in parts]) for item in chosen[level]))
        if level < len(levels):
            _tie_stages(aligned, [each[2][level] for each in logs])
    result = aligned.tree([part.site.result for part in parts], "the block's result")
    bound = Binder(getattr(site.module, site.method))(site.args, site.kwargs)
    others = {k: v for k, v in bound.items() if k not in (name, *(m.name for m in more))}
    joints = tuple(
        Joint(
            tuple(member.source for member in stage.members),
            tuple(member.out for member in stage.members),
            level,
            stage.body.inputs,
            stage.body.outputs,
        )
        for level, found in enumerate(levels)
        for stage in found
    )
    segments = _carried(steps, joints, result)
    return DenseSlice(name, others, more, bound[name].slot, joints, segments, steps[-1], result)


def _entries(levels: Sequence[Sequence[Stage]]) -> tuple[int, ...]:
    return tuple(i for level in levels for stage in level for i in stage.entries)


def _segments(main: Blocks, levels: Sequence[Sequence[Stage]]) -> list[list[Item]]:
    """The items that each level's rows need with the levels before it as given, and those that the result needs."""
    known: list[tuple[int, int]] = []
    taken: set[int] = set()
    segments = []
    wanted = [[(m.source, m.first) for stage in level for m in stage.members] for level in levels]
    ends = [(slot, main.site.end) for slot in slots(main.site.result)]
    for heads, level in zip([*wanted, ends], [*levels, ()], strict=True):
        items = needed(main, heads, *known)
        if items is None:
            raise NotLifted("the block's result needs values computed among its experts")
        segments.append([item for item in items if item.start not in taken])
        taken |= {item.start for item in items}
        known += [(member.out, member.last) for stage in level for member in stage.members]
    return segments


def _check_replaced(main: Blocks, levels: Sequence[Sequence[Stage]], kept: Sequence[Item]) -> None:
    entries = {i for item in kept for i in range(item.start, item.end)}
    dropped = set(range(main.site.start, main.site.end)) - entries
    params = frozenset().union(*(stage.body.params for level in levels for stage in level))
    named = frozenset(_entries(levels))
    for level in levels:
        for member in (member for stage in level for member in stage.members):
            check_replaced(main.log, (member.out, member.last + 1), dropped, named, params, main.site.start)


def _check_order(log: Log, segments: Sequence[Sequence[Item]]) -> None:
    """Refuse where an operation would run after one that it ran before and that writes to what it reads."""
    for i, segment in enumerate(segments):
        for item in segment:
            written = {log.storages[s] for e in log.entries[item.start : item.end] for s in e.writes}
            for later in (other for rest in segments[i + 1 :] for other in rest):
                if later.start < item.start and written & {log.storages[s] for s in later.reads}:
                    raise NotLifted(f"{item.name} writes to what {later.name} reads before it")


def _tie_stages(aligned: Aligned, levels: Sequence[Sequence[Stage]]) -> None:
    """The rows of corresponding members must correspond; from now on their results do."""
    for same in zip(*levels, strict=True):
        for members in zip(*(stage.members for stage in same), strict=True):
            sources = tuple(member.source for member in members)
            if sources not in aligned.match.get(sources[0], ()):
                raise NotLifted("the experts' rows are not computed by the block itself")
            outs = tuple(member.out for member in members)
            aligned.match.setdefault(outs[0], {})[outs] = None


def _carried(steps: Sequence[tuple[Step, ...]], joints: Sequence[Joint], result: Any) -> tuple[Segment, ...]:
    """Segments with what they take from before and give to what comes after."""
    segments: list[Segment] = []
    for level, here in enumerate(steps[:-1]):
        later = set(slots(result))
        for rest in steps[level + 1 :]:
            later |= used_by(rest, ())
        later |= {slot for joint in joints if joint.level >= level for slot in joint.xs}
        made = {slot for step in here for slot in step.outs if slot is not None}
        segments.append(Segment(here, tuple(sorted(used_by(here, ()))), tuple(sorted(made & later))))
    return tuple(segments)
