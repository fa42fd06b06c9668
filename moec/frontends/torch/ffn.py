"""Analysis of plain FFN layers: an up-projection (or gate and up), an activation with a name, a down-projection.

T tokens, D width, F hidden width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from moec.frontends.torch.banks import Bank
from moec.frontends.torch.binding import Binder
from moec.frontends.torch.body import Body, build_body
from moec.frontends.torch.calls import DirectCall
from moec.frontends.torch.direct import Roles, fit_roles, steering_reads
from moec.frontends.torch.discover import Candidate, is_widening
from moec.frontends.torch.dropped import check_direct
from moec.frontends.torch.effects import Watch
from moec.frontends.torch.entered import replaced_by
from moec.frontends.torch.formula import Written
from moec.frontends.torch.instances import Instance, NotLifted, check_instance, roles, with_scale
from moec.frontends.torch.items import split
from moec.frontends.torch.lift import common_dtype, lift_dense, weight_views
from moec.frontends.torch.lifted import Lifted
from moec.frontends.torch.linears import Linear, LinearFinder
from moec.frontends.torch.observe import Driver, Drivers, ProbeFailed
from moec.frontends.torch.observe import tokens as random_tokens
from moec.frontends.torch.oplog import Log, Site
from moec.frontends.torch.probing import counts, inputs
from moec.frontends.torch.sizes import Size, solve
from moec.frontends.torch.sliceit import Observed, observe_shapes, same_site, sites_of, slice_at
from moec.frontends.torch.solve import solve_dense
from moec.verify import Probe


class NotRun(NotLifted):
    """No module around the candidate could be called."""


def analyse_ffn(candidate: Candidate, drivers: Drivers, params: Mapping[str, torch.Tensor]) -> list[Lifted] | None:
    """The FFN layers inside the candidate; None when it holds none.

    Raises NotLifted when it holds one that cannot be cut, NotRun when it could not be run.
    """
    weights = [params[n] for n in sorted(candidate.weights)]
    sides = Counter(n for p in weights for n in p.shape)
    widths = [n for n, _ in sides.most_common()]
    for driver in drivers.drivers(candidate.name, widths, weights[0].dtype, weights[0].device):
        try:
            log, _ = driver.observe()
        except ProbeFailed as failure:
            drivers.failed(driver, failure)
            continue
        mixed: list[NotLifted] = []
        pairs = find_pairs(log, params, candidate.weights, mixed)
        if not pairs and mixed and is_widening(params[n] for n in candidate.weights):
            raise mixed[0]
        if not pairs:
            return None
        return [_cut(driver, log, instance, params, candidate) for instance in pairs]
    raise NotRun("could not be run alone; pass example_inputs")


def find_pairs(
    log: Log, params: Mapping[str, torch.Tensor], weights: set[str], mixed: list[NotLifted] | None = None
) -> list[Instance]:
    """Instances up -> activation -> down whose ends are equally wide; `mixed` gets why others are none."""
    linears = LinearFinder(log, dict(params), lambda name: name in weights).find(0, len(log.entries))
    stop = {linear.out: linear.last for linear in linears}
    position = {linear.out: i for i, linear in enumerate(linears)}
    found: list[Instance] = []
    used: set[int] = set()
    for i, linear in enumerate(linears):
        middle = log.closure([(linear.source, linear.entry)], stop=stop)
        touched = {s for e in middle for s in log.entries[e].reads} | {linear.source}
        ups = sorted(position[s] for s in touched if s in position)
        if not 1 <= len(ups) <= 2 or used & {i, *ups} or not _ffn_shapes(linears, ups, linear):
            continue
        instance = Instance(tuple(linears[j] for j in ups), linear, tuple(sorted(middle)))
        try:
            instance = with_scale(log, instance, stop, params)
            check_instance(log, instance)
            activation = _body(log, instance).activation
        except NotLifted as reason:
            if mixed is not None:
                mixed.append(reason)
            continue
        if isinstance(activation, Written) or (activation and (activation.gated or activation.fn != "identity")):
            used |= {i, *ups}
            found.append(instance)
    return found


def _ffn_shapes(linears: list[Linear], ups: list[int], down: Linear) -> bool:
    first = linears[ups[0]].weight
    return down.weight.shape[0] == first.shape[1] and all(linears[j].weight.shape == first.shape for j in ups)


def _body(log: Log, instance: Instance) -> Body:
    return build_body(log, [instance], [Bank(role, (view,)) for role, view in roles(instance).items()], {})


def _cut(
    driver: Driver, log: Log, instance: Instance, params: Mapping[str, torch.Tensor], candidate: Candidate
) -> Lifted:
    body = _body(log, instance)
    sites = sorted((s for s in log.sites if s.covers(instance.entries)), key=lambda s: s.end - s.start)
    for site in sites:
        found = fit_roles(log, site, body, params, routed=False)
        if found is not None and steering_reads(log, site, [_slot(site, found)]) is None:
            check_direct(log, site, body.params, instance.entries)
            return _direct(log, site, found, body, params)
    return _slice(driver, body, params, candidate)


def _slot(site: Site, found: Roles) -> int:
    return int(Binder(getattr(site.module, site.method))(site.args, site.kwargs)[found.x].slot)


def _direct(log: Log, site: Site, found: Roles, body: Body, params: Mapping[str, torch.Tensor]) -> Lifted:
    method = getattr(site.module, site.method)
    binder = Binder(method)
    bound = binder(site.args, site.kwargs)
    x = log.tensors[bound[found.x].slot]
    dtype = x.dtype
    region = lift_dense(site.label or "model", body, dtype=common_dtype(body, params, dtype))
    others = {k: v for k, v in bound.items() if k != found.x}

    def ask(rows: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return binder.unbind({**others, found.x: rows})

    watch = Watch(site.module, [x], hear=True)
    try:
        out_shapes = _result_shapes(method, ask, x, body.inputs)
        effects = watch.changes()
    finally:
        watch.undo()
    if effects:
        raise NotLifted(f"{site.label or 'the FFN'} {effects[0]}")
    call = DirectCall(binder, found, others, dtype, 1, body.inputs, out_shapes)

    def probes() -> Iterator[Probe]:
        for rank in out_shapes:
            sizes = counts(site.module, body, 1) if rank == x.dim() else [1, 5]
            for label, rows in inputs(rank, body.inputs, dtype, x.device, sizes):
                yield Probe(f"{label}, rank {rank}", *ask(rows), partial(_exact, body, params, rows))

    replaced = replaced_by(site, [log])
    evidence = (f"{site.label}({found.x}) is down(act(up(x)))", f"between the layers: {body.between}")
    views = weight_views(body, site.path, dense=True)
    return Lifted(
        site.path, "ffn", "ffn", site.module, site.method, call, body, region, views, replaced, evidence, probes, dtype
    )


def _result_shapes(
    method: Any, ask: Callable[[torch.Tensor], Any], x: torch.Tensor, width: int
) -> dict[int, tuple[int | Size, ...]]:
    """The result's shape for inputs [T, D] and [B, S, D], where the method takes them; x's own rank it must."""
    found: dict[int, tuple[int | Size, ...]] = {}
    for shapes in ([(6, width), (15, width), (7, width)], [(2, 3, width), (3, 5, width), (1, 7, width)]):
        rank = len(shapes[0])
        outs = []
        try:
            for shape in shapes:
                args, kwargs = ask(random_tokens(shape, x.dtype, 4, device=x.device))
                with torch.no_grad():
                    outs.append(tuple(method(*args, **kwargs).shape))
        except Exception as error:  # the user's code may take one rank only
            if rank == x.dim():
                raise NotLifted(f"it does not run at other sizes: {error}") from error
            continue
        sizes = [solve([o[i] for o in outs], shapes) for i in range(len(outs[0]))]
        if all(s is not None for s in sizes):
            found[rank] = tuple(s for s in sizes if s is not None)
        elif rank == x.dim():
            raise NotLifted("the result's shape does not follow from the input's")
    if x.dim() not in found:
        raise NotLifted(f"an FFN is cut for inputs [T, D] and [B, S, D], not for {x.dim()} dimensions")
    return found


def _exact(body: Body, params: Mapping[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """The FFN in fp32."""
    return body.expert(params, 0, rows.reshape(-1, body.inputs).float())


def _slice(driver: Driver, body: Body, params: Mapping[str, torch.Tensor], candidate: Candidate) -> Lifted:
    """Cut the FFN out of the smallest call that holds it."""
    seen, matched = [], []
    for log, effects in observe_shapes(driver):
        if effects:
            raise NotLifted(f"the block {effects[0]}")
        match = [i for i in find_pairs(log, params, candidate.weights) if _body(log, i) == body]
        if len(match) != 1:
            raise NotLifted("the FFN is not found once at every shape")
        matched.append(match[0])
        seen.append(Observed(log, tuple(sorted(match[0].entries)), match[0].out))
    reasons = []
    for site in sites_of(seen[0])[:3]:
        try:
            solution = solve_dense(
                split(seen[0].log, same_site(site, seen[0].log), seen[0].entries), body, params, matched[0].rows
            )
            if solution is None:
                raise NotLifted(f"{site.label}: no tensor of the block is the FFN's result")
            evidence = (f"{site.label} sliced around down(act(up(x)))", f"between the layers: {body.between}")
            return slice_at(site, seen, solution, body, params, evidence)
        except NotLifted as reason:
            reasons.append(str(reason))
    raise NotLifted(reasons[0] if reasons else "no call holds the FFN")
