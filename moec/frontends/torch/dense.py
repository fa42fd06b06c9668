"""Dense mixtures: members alike whose results gates of the block's own mix, several gates and several levels included.

Tried for candidates that are no other mixture. T tokens, E members of a stage, D inputs of one, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from moec.frontends.torch.binding import Binder
from moec.frontends.torch.chain import Chain
from moec.frontends.torch.denseslice import DenseCall, DenseSlice, slice_dense
from moec.frontends.torch.discover import Candidate
from moec.frontends.torch.entered import replaced_by
from moec.frontends.torch.fields import Fields
from moec.frontends.torch.instances import NotLifted
from moec.frontends.torch.lift import common_dtype, lift_stages, stage_views
from moec.frontends.torch.lifted import Lifted
from moec.frontends.torch.linears import LinearFinder
from moec.frontends.torch.members import Stage, find_members, stages
from moec.frontends.torch.mixing import are_mixed
from moec.frontends.torch.observe import Driver, Drivers, ProbeFailed, resized
from moec.frontends.torch.observe import tokens as random_tokens
from moec.frontends.torch.oplog import Log, Site
from moec.frontends.torch.probing import counts, inputs
from moec.frontends.torch.sliceit import SHAPES, check_assigned, same_site
from moec.trees import tree_flatten
from moec.verify import Probe

Levels = tuple[tuple[Stage, ...], ...]


class NoMixture(NotLifted):
    """Nothing in the log is a dense mixture: what was found before says more."""


@dataclass(frozen=True)
class _Seen:
    """One run of the driver with its stages, level by level."""

    log: Log
    levels: Levels


def analyse_dense(
    candidate: Candidate, offered: Collection[str], drivers: Drivers, params: Mapping[str, torch.Tensor]
) -> Lifted:
    """The lifted layer, which may have other `offered` weights beside the candidate's.

    Raises NoMixture where there is no dense mixture, NotLifted where one cannot be cut.
    """
    weights = [params[n] for n in sorted(candidate.weights)]
    widths = list(dict.fromkeys(n for p in weights for n in (p.shape[-1], p.shape[-2])))
    reasons: list[NotLifted] = []
    for driver in drivers.drivers(candidate.name, widths, weights[0].dtype, weights[0].device):
        try:
            return _from_driver(candidate, offered, driver, params)
        except NotLifted as reason:
            reasons.append(reason)
    said = [reason for reason in reasons if not isinstance(reason, NoMixture | ProbeFailed)]
    raise said[0] if said else NoMixture("no members whose results gates mix")


def _from_driver(
    candidate: Candidate, offered: Collection[str], driver: Driver, params: Mapping[str, torch.Tensor]
) -> Lifted:
    x = driver.main
    if x is None:
        raise NoMixture("no tokens")

    def read(log: Log) -> list[Stage]:
        linears = LinearFinder(log, dict(params), lambda name: name in offered).find(0, len(log.entries))
        return stages(log, find_members(log, linears), params)

    log, _ = driver.observe()
    first = read(log)
    reasons: list[NotLifted] = []
    fields: Fields | None = None
    for site in sorted(log.sites, key=lambda s: s.end - s.start):
        mixed = _mixed(log, site, first)
        if not any(stage.body.params & candidate.weights for level in mixed for stage in level):
            continue
        try:
            fields = fields or Fields.of(x, partial(_run, driver))
            return _from_site(site, _observed(driver, x, fields, read, mixed), fields, params)
        except NotLifted as reason:
            reasons.append(reason)
    raise reasons[0] if reasons else NoMixture("no members whose results gates mix")


def _from_site(site: Site, seen: Sequence[_Seen], fields: Fields, params: Mapping[str, torch.Tensor]) -> Lifted:
    site = same_site(site, seen[0].log)
    sliced = slice_dense(site, [(one.log, same_site(site, one.log), one.levels) for one in seen])
    return _lifted(site, seen, sliced, fields, params)


def _run(driver: Driver, x: torch.Tensor) -> bool:
    """Whether the driver's module takes these tokens."""
    try:
        driver.with_input(x).observe()
    except ProbeFailed:
        return False
    return True


def _mixed(log: Log, site: Site, found: Sequence[Stage]) -> Levels:
    """The stages in the call whose members gates mix, those first that others need."""
    inside = [s for s in found if site.covers(s.entries) and are_mixed(log, site, s.members)]
    levels: list[list[Stage]] = []
    for stage in inside:  # in the order of their depth
        behind = log.closure([(m.source, m.first) for m in stage.members], start=site.start)
        before = [i for i, level in enumerate(levels) if any(behind.intersection(s.entries) for s in level)]
        place = 1 + max(before, default=-1)
        if place == len(levels):
            levels.append([])
        levels[place].append(stage)
    return tuple(map(tuple, levels))


def _observed(
    driver: Driver, x: torch.Tensor, fields: Fields, read: Callable[[Log], list[Stage]], wanted: Levels
) -> list[_Seen]:
    """Logs at several shapes, each with the same stages."""
    seen = []
    for i, (batch, length) in enumerate(SHAPES):
        shape = (batch, length, x.shape[-1]) if x.dim() == 3 else (batch * length, x.shape[-1])
        probe = fields.fill(random_tokens(shape, x.dtype, 20 + i, device=x.device), 20 + i)
        log, effects = driver.with_input(probe).observe()
        if effects:
            raise NotLifted(f"the block {effects[0]}")
        found = {_key(stage): stage for stage in read(log)}
        if any(_key(stage) not in found for level in wanted for stage in level):
            raise NoMixture("which experts run, or on what, is decided by the input")
        seen.append(_Seen(log, tuple(tuple(found[_key(stage)] for stage in level) for level in wanted)))
    return seen


def _key(stage: Stage) -> Any:
    """What tells a stage from others: the weights of its members and what they do with them."""
    banks = tuple(sorted((role, bank.views) for role, bank in stage.body.banks.items()))
    return banks, str(stage.body.activation), stage.body.steps if isinstance(stage.body, Chain) else ()


def _lifted(
    site: Site, seen: Sequence[_Seen], sliced: DenseSlice, fields: Fields, params: Mapping[str, torch.Tensor]
) -> Lifted:
    logs = [one.log for one in seen]
    check_assigned(site, sliced.kept, logs)
    found = [stage for level in seen[0].levels for stage in level]
    given = logs[0].tensors[sliced.input_slot]
    bodies = [stage.body for stage in found]
    largest = max(found, key=lambda stage: sum(bank.views[0].shape[0] for bank in stage.body.banks.values()))
    dtypes = [common_dtype(stage.body, params, logs[0].tensors[stage.members[0].source].dtype) for stage in found]
    if len({*dtypes}) > 1:
        raise NotLifted(f"its levels are of different dtypes: {', '.join(dict.fromkeys(dtypes))}")
    call = DenseCall(Binder(getattr(site.module, site.method)), sliced, given.dim(), given.dtype, given.shape[-1])
    return Lifted(
        name=site.path,
        kind="moe",
        cut="slice",
        module=site.module,
        method=site.method,
        call=call,
        body=largest.body,
        region=lift_stages(site.label or "model", bodies, dtype=dtypes[0]),
        views=stage_views(bodies, site.path),
        replaced=replaced_by(site, logs, sliced.kept),
        evidence=(*_evidence(site, seen[0].levels), f"runs as it is written, around the experts: {_listed(sliced)}"),
        probes=partial(_probes, site, call, largest, fields, seen),
        dtype=given.dtype,
    )


def _listed(sliced: DenseSlice) -> str:
    return ", ".join(sliced.around)


def _evidence(site: Site, levels: Levels) -> Iterator[str]:
    label = site.label or "the model"
    yield f"{label} sliced: a dense mixture, all experts take all rows, and gates of its own mix what they give"
    for i, level in enumerate(levels):
        for stage in level:
            where = f"level {i + 1}: " if len(levels) > 1 else ""
            rows = len({member.source for member in stage.members})
            taking = "the same rows" if rows == 1 else f"{rows} tensors of rows"
            between = stage.body.text() if isinstance(stage.body, Chain) else str(stage.body.activation or "")
            what = f"between the layers: {between}" if between else "experts of one matrix"
            yield f"{where}{len(stage.members)} experts, all of them run and unified, take {taking}; {what}"


def _probes(site: Site, call: DenseCall, stage: Stage, fields: Fields, seen: Sequence[_Seen]) -> Iterator[Probe]:
    s, members = call.sliced, stage.members
    log = seen[0].log
    given = log.tensors[s.input_slot]
    sizes = counts(site.module, stage.body, len(members))
    for i, (label, x) in enumerate(inputs(given.dim(), given.shape[-1], given.dtype, given.device, sizes)):
        more = {m.name: resized(log.tensors[m.slot], m.sizes(x.shape)) for m in s.more}
        args, kwargs = call.binder.unbind({**s.others, s.x_name: fields.fill(x, i), **more})
        exact = given.dtype in (torch.float32, torch.float64)
        yield Probe(label, args, kwargs, None if exact else partial(_judge, site, call, seen[0].levels, args, kwargs))


def _judge(site: Site, call: DenseCall, levels: Levels, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The block with its experts evaluated in fp32."""
    params = dict(site.module.named_parameters(remove_duplicate=False)) | dict(site.module.named_buffers())
    lead = f"{site.path}." if site.path else ""
    named = {lead + name: tensor for name, tensor in params.items()}
    found: list[Stage] = [stage for level in levels for stage in level]

    def exact(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = given[::3]
        return tuple(_all(stage, named, x.float()) for stage, x in zip(found, rows, strict=True))

    result = call(site.module, exact, args, kwargs)
    return next(t for t in tree_flatten(result)[0] if isinstance(t, torch.Tensor)).float()


def _all(stage: Stage, params: Mapping[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    parts = rows.chunk(len(stage.members)) if rows.shape[0] else [rows] * len(stage.members)
    return torch.cat([stage.body.expert(params, e, part) for e, part in enumerate(parts)])
