"""The sliced cut for a mixture whose routing and experts are written in one block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from moec.frontends.torch.body import Body
from moec.frontends.torch.drawn import with_effects
from moec.frontends.torch.expertchoice import CHOSEN
from moec.frontends.torch.instances import NotLifted, check_masks
from moec.frontends.torch.items import Blocks, split
from moec.frontends.torch.lifted import Lifted
from moec.frontends.torch.observe import Driver
from moec.frontends.torch.observe import tokens as random_tokens
from moec.frontends.torch.oplog import Log, Site
from moec.frontends.torch.rowmasks import RowMask, idle_masks
from moec.frontends.torch.sliceit import SHAPES, Observed, same_site, single_input, sites_of, slice_at
from moec.frontends.torch.solve import Nearest, Solution

_TRIES = 6
# Of more experts than this, random tokens do not reach all.
_MANY = 32


class Unsolved(NotLifted):
    """No tensors of a block satisfy the formula."""


@dataclass(frozen=True)
class Reading:
    """How a log is read: the body it shows, the entries of its experts, and which of them ran."""

    body: Body
    entries: tuple[int, ...]
    reached: frozenset[object]
    masks: tuple[RowMask, ...] = ()


Seen = tuple[list[Observed], list[Log], Reading]
Solve = Callable[[Blocks, Body, Mapping[str, torch.Tensor], Nearest], Solution | None]


def analyse_slice(observed: Callable[[], Seen], params: Mapping[str, torch.Tensor], solve: Solve) -> Lifted:
    """Slice the smallest block around the experts that can be; raises NotLifted with the reason for the smallest."""
    seen, more, first = observed()
    reasons: list[NotLifted] = []
    for site in sites_of(seen[0])[:4]:
        for opened in (False, True):
            blocks = split(seen[0].log, site, seen[0].entries, opened=opened)
            if opened and all(item.site is None for item in split(seen[0].log, site, seen[0].entries).items):
                continue
            try:
                return _slice(site, seen, more, first, params, blocks, solve, opened=opened)
            except NotLifted as reason:
                reasons.append(reason)
    # How far a cut came says more than that another block does not hold the formula.
    far = [reason for reason in reasons if not isinstance(reason, Unsolved)] or reasons
    raise far[0] if far else NotLifted("no call holds all of the experts")


def _slice(
    site: Site,
    seen: list[Observed],
    more: list[Log],
    reading: Reading,
    params: Mapping[str, torch.Tensor],
    blocks: Blocks,
    solve: Solve,
    *,
    opened: bool,
) -> Lifted:
    """The site sliced around its experts; raises NotLifted with the reason."""
    name = site.label or "the model"
    nearest, body = Nearest(), reading.body
    solution = solve(blocks, body, params, nearest)
    if solution is None:
        why = "no tensors x, experts, weights and y of the block satisfy y = sum of w * f(x)"
        raise Unsolved(f"{name}: {why}", nearest.text)
    is_ids, around = partial(_holds_ids, blocks, solution), _idle(blocks, solution, reading)
    check_masks(blocks.log, reading.masks, is_ids, body.experts, around)
    body = replace(body, identities=solution.identities)
    for other in seen[1:]:
        same_site(site, other.log)
    if solution.identities:
        name = f"{name}, tokens without an expert as they are,"
    how = solution.places.text() if solution.places is not None else f"{solution.num_slots} per token"
    how = "each chooses its tokens" if solution.form in CHOSEN else how
    evidence = (
        f"{name} sliced: its own operations, the experts, its own operations; routing given as {solution.form}",
        f"{body.experts} experts, all of them seen at work and unified; {how}",
        f"between the layers: {body.between}" if body.activation else "experts of one matrix",
    )
    return slice_at(site, seen, solution, body, params, evidence, more, opened=opened)


def _idle(blocks: Blocks, solution: Solution, reading: Reading) -> Iterator[RowMask]:
    """Masks that did nothing, among what the slice replaces around the experts."""
    log, start = blocks.log, blocks.site.start
    given = [slot for slot in (solution.x, solution.selector, solution.weights) if slot is not None]
    kept = log.closure([(slot, blocks.first) for slot in given], start=start)
    made = log.closure([(solution.y, solution.complete + 1)], start=start)
    return idle_masks(log, made.difference(kept, reading.entries))


def _holds_ids(blocks: Blocks, solution: Solution, slot: int) -> bool:
    """Whether a tensor has the ids that the solution found, in their order."""
    log = blocks.log
    if solution.selector is None or solution.form not in ("indices", "unit") or log.tensors[slot].is_floating_point():
        return False
    ids, held = log.value(solution.selector, blocks.first), log.value(slot, blocks.first)
    if ids is None or held is None or ids.numel() != held.numel():
        return False
    return torch.equal(ids.flatten().long(), held.flatten().long())


def _toward_experts(module: torch.nn.Module, probe: torch.Tensor, experts: int) -> torch.Tensor:
    """Tokens along the rows of any [E, D] parameter: where a router's rows are, each expert is chosen by its own."""
    width = probe.shape[-1]
    rows = [p.detach() for p in module.parameters() if tuple(p.shape) == (experts, width)]
    if not rows:
        return probe
    every = torch.cat([sign * scale * r for r in rows for sign in (1, -1) for scale in (1.0, 10.0)])
    tokens = probe.reshape(-1, width).clone()
    count = min(len(every), len(tokens))
    tokens[:count] = every[:count].to(tokens.dtype) + 0.01 * tokens[:count]
    return tokens.view(probe.shape)


def _length(tries: int, first: Reading | None) -> int:
    """How long two sequences are to reach more experts: with a token for each of them from the first."""
    experts = 0 if first is None else first.body.experts
    return max(16 << min(tries, 4), min(-(-experts // 2), 16 << 4))


def observe_experts(
    driver: Driver, read: Callable[[Log], Reading], initial: tuple[Log, list[str], Reading] | None = None
) -> Seen:
    """Logs at several shapes, more that were needed until every expert had run, and the body unified over all.

    `initial` is a run of the driver as it is, which need not be run again where its shape is asked for.
    """
    x = single_input(driver)
    seen: list[Observed] = []
    more: list[Log] = []
    reached: set[object] = set()
    first: Reading | None = None
    watch = driver.watch()
    for i in range(len(SHAPES) + _TRIES):
        batch, length = SHAPES[i] if i < len(SHAPES) else (2, _length(i - len(SHAPES), first))
        shape = (batch, length, x.shape[-1]) if x.dim() == 3 else (batch * length, x.shape[-1])
        if initial is not None and shape == tuple(x.shape) and not seen:
            probed, (log, effects, reading) = driver, initial
        else:
            probe = random_tokens(shape, x.dtype, 20 + i, device=x.device)
            if first is not None and i > len(SHAPES) - (first.body.experts > _MANY):
                probe = _toward_experts(driver.module, probe, first.body.experts)
            probed, reading = driver.with_input(probe), None
            log, effects = probed.observe(watch)
        if effects:
            raise with_effects(probed, effects)
        reading = reading or read(log)
        if first is None:
            first = reading
        elif reading.body != first.body:
            raise NotLifted("the experts compute different things for different inputs")
        reached |= reading.reached
        if i < len(SHAPES):
            seen.append(Observed(log, reading.entries))
        else:
            more.append(log)
        if i >= len(SHAPES) - 1 and len(reached) >= first.body.experts:
            break
    assert first is not None
    count = first.body.experts
    if len(reached) < count:
        raise NotLifted(f"{count - len(reached)} of {count} experts were never reached by the probes")
    return seen, more, first
