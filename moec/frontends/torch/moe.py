"""Analysis of one MoE candidate: observe, unify, cut at the lowest call that is the formula, else slice the block.

T tokens, K experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial

import torch

from moec.frontends.torch.banks import unify
from moec.frontends.torch.batched import read_batched, read_products
from moec.frontends.torch.body import build_body
from moec.frontends.torch.chosen import fit_choice, lift_choice
from moec.frontends.torch.direct import fit_roles
from moec.frontends.torch.discover import Candidate
from moec.frontends.torch.drawn import with_effects
from moec.frontends.torch.dropped import WritesOutside
from moec.frontends.torch.instances import NotLifted, Unsuited, find_instances
from moec.frontends.torch.joined import joined_products
from moec.frontends.torch.lifted import Lifted
from moec.frontends.torch.linears import LinearFinder
from moec.frontends.torch.named import with_limits
from moec.frontends.torch.observe import Driver, Drivers, ProbeFailed
from moec.frontends.torch.oplog import Log, Site
from moec.frontends.torch.placed import fit_places, lift_placed
from moec.frontends.torch.routedslice import Reading, Seen, Unsolved, analyse_slice, observe_experts
from moec.frontends.torch.solve import solve_chosen, solve_routed
from moec.frontends.torch.solveplaced import solve_placed
from moec.frontends.torch.submodule import lift_submodule
from moec.frontends.torch.tail import with_tail


def analyse_moe(candidate: Candidate, drivers: Drivers, params: Mapping[str, torch.Tensor]) -> Lifted:
    """The lifted layer. Raises NotLifted with the first reason that stood in the way."""
    weights = [params[n] for n in sorted(candidate.weights)]
    widths = list(dict.fromkeys(n for p in weights for n in (p.shape[-1], p.shape[-2])))
    reasons: dict[str, list[NotLifted]] = {}
    for driver in drivers.drivers(candidate.name, widths, weights[0].dtype, weights[0].device):
        if len(reasons) >= 2 and driver.path not in reasons:
            break
        try:
            run = driver.observe()
        except ProbeFailed as failure:
            drivers.failed(driver, failure)
            continue
        try:
            lifted = _from_log(candidate, driver, run, params)
            again = drivers.drivers(candidate.name, widths, weights[0].dtype, weights[0].device)
            lifted = with_limits(lifted, run[0], driver, again, params)
            drivers.serves(driver)
            return lifted
        except NotLifted as reason:
            # A block that runs at its own sizes only was not probed; what the one run did says more than that.
            whole = with_effects(driver, run[1]) if run[1] and isinstance(reason, ProbeFailed) else reason
            reasons.setdefault(driver.path, []).append(whole)
    if reasons:
        every = [reason for found in reasons.values() for reason in found]
        said = [reason for reason in every if not isinstance(reason, ProbeFailed)]
        first = next((reason for reason in said if not isinstance(reason, Unsuited)), (said or every)[0])
        lines = (f"{path or 'the model'}: {reason.whole}" for path, found in reasons.items() for reason in found)
        first.tried = tuple(dict.fromkeys(lines))
        raise first
    failed = tuple(dict.fromkeys(drivers.failures[-3:]))
    why = "; ".join(failed) or "no module above it could be called"
    refusal = NotLifted(f"could not be run ({why}); pass example_inputs")
    refusal.tried = failed
    raise refusal


def _from_log(
    candidate: Candidate, driver: Driver, run: tuple[Log, list[str]], params: Mapping[str, torch.Tensor]
) -> Lifted:
    own = dict(params)

    def read(log: Log) -> Reading:
        linears = LinearFinder(log, own, lambda name: name in candidate.weights).find(0, len(log.entries))
        if not linears:
            return read_batched(log, candidate.weights, params)
        joined = joined_products(log, linears, driver.module, driver.path, params)
        if joined is not None:
            return read_products(log, joined, params)
        instances = [with_tail(log, instance, own) for instance in find_instances(log, linears, params)]
        banks = unify(log, driver.module, driver.path, instances, own)
        body = build_body(log, instances, banks, params)
        entries = tuple(sorted({i for inst in instances for i in inst.entries}))
        return Reading(
            body,
            entries,
            frozenset(inst.ups[0].weight for inst in instances if log.tensors[inst.rows].numel()),
            tuple(mask for inst in instances for mask in inst.masks),
        )

    log, effects = run
    reading, written = read(log), None
    for site in _sites(log, reading):
        roles = fit_roles(log, site, reading.body, params, routed=True)
        if roles is not None:
            try:
                return lift_submodule(log, site, roles, reading, params, read)
            except WritesOutside as reason:  # the block that it is called in may own what it writes to
                written = reason
                break
        choice = fit_choice(log, site, reading.body, params)
        if choice is not None:
            return lift_choice(log, site, choice, reading, params, read)
    observed = _once(partial(observe_experts, driver, read, (log, effects, reading)))
    attempts: tuple[Callable[[], Lifted], ...] = (
        partial(analyse_slice, observed, params, solve_routed),
        partial(_by_places, log, reading, params, read, observed),
        partial(analyse_slice, observed, params, solve_chosen),
    )
    reasons: list[NotLifted] = []
    for attempt in attempts:
        try:
            return attempt()
        except NotLifted as reason:
            if written is not None:
                raise written from reason
            reasons.append(reason)
    # How far a cut came says more than that none holds the formula.
    raise next((reason for reason in reasons if not isinstance(reason, Unsolved)), reasons[0])


def _once(observe: Callable[[], Seen]) -> Callable[[], Seen]:
    """What the first call gives or raises, for every attempt: a block that cannot be observed is run no more."""

    @cache
    def first() -> Seen | NotLifted:
        try:
            return observe()
        except NotLifted as reason:
            return reason

    def again() -> Seen:
        found = first()
        if isinstance(found, NotLifted):
            raise found
        return found

    return again


def _by_places(
    log: Log,
    reading: Reading,
    params: Mapping[str, torch.Tensor],
    read: Callable[[Log], Reading],
    observed: Callable[[], Seen],
) -> Lifted:
    """The layer as experts that take rows by position: a call that is just that, or a slice of a block.

    Raises NotLifted with the reason.
    """
    for site in _sites(log, reading):
        found = fit_places(log, site, reading.body, params)
        try:
            if found is not None:
                return lift_placed(log, site, found, reading, params, read)
        except NotLifted:
            continue
    return analyse_slice(observed, params, solve_placed)


def _sites(log: Log, reading: Reading) -> list[Site]:
    """Calls that hold all of the experts, smallest first."""
    return sorted((s for s in log.sites if s.covers(reading.entries)), key=lambda s: s.end - s.start)
