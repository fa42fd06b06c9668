"""Analysis of a block as a slice: observe it at several shapes, slice around its experts, make that callable.

B sequences, S positions, T = B * S tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from moec.frontends.torch.binding import Binder
from moec.frontends.torch.body import Body
from moec.frontends.torch.calls import SlicedCall
from moec.frontends.torch.direct import tensors_of
from moec.frontends.torch.entered import replaced_by
from moec.frontends.torch.expertchoice import CHOSEN, slots_of
from moec.frontends.torch.ids import Ids
from moec.frontends.torch.instances import NotLifted, Unsuited
from moec.frontends.torch.items import Blocks, split
from moec.frontends.torch.lift import DTYPES, common_dtype, lift_chosen, lift_dense, lift_moe, weight_views
from moec.frontends.torch.lifted import Lifted
from moec.frontends.torch.observe import Driver, resized
from moec.frontends.torch.observe import tokens as random_tokens
from moec.frontends.torch.oplog import Log, Site
from moec.frontends.torch.probing import counts, inputs
from moec.frontends.torch.sliced import Slice, slice_block, tokens_of
from moec.frontends.torch.solve import Solution
from moec.ir import Region
from moec.trees import tree_flatten
from moec.verify import Probe

SHAPES = ((2, 20), (3, 7), (5, 4), (1, 11))


@dataclass(frozen=True)
class Observed:
    """One run of the driver: its log, the entries of the experts, and the tensor they end in where there is one."""

    log: Log
    entries: tuple[int, ...]
    out: int | None = None


def observe_shapes(driver: Driver) -> Iterator[tuple[Log, list[str]]]:
    """Logs of the driver at several shapes of its one input."""
    x = single_input(driver)
    for i, (batch, length) in enumerate(SHAPES):
        shape = (batch, length, x.shape[-1]) if x.dim() == 3 else (batch * length, x.shape[-1])
        yield driver.with_input(random_tokens(shape, x.dtype, 20 + i, device=x.device)).observe()


def single_input(driver: Driver) -> torch.Tensor:
    """The tokens among the driver's arguments; raises NotLifted when there are none."""
    found = driver.main
    if found is None:
        raise Unsuited("a block is sliced when it takes a tensor of tokens, [T, D] or [B, S, D]")
    return found


def sites_of(first: Observed) -> list[Site]:
    """Calls that hold all of the experts' entries, smallest first."""
    return sorted((s for s in first.log.sites if s.covers(first.entries)), key=lambda s: (s.end - s.start, -s.start))


def same_site(site: Site, log: Log) -> Site:
    """The site of the same call in another log."""
    found = next((s for s in log.sites if (s.path, s.method) == (site.path, site.method)), None)
    if found is None:
        raise NotLifted(f"{site.label} is not called at every shape")
    return found


def slice_at(
    site: Site,
    seen: Sequence[Observed],
    solution: Solution,
    body: Body,
    params: Mapping[str, torch.Tensor],
    evidence: Sequence[str],
    more: Sequence[Log] = (),
    *,
    opened: bool = False,
) -> Lifted:
    """The lifted layer that slices `site`; the solution is for the first log, `more` reach experts `seen` do not."""
    parts = [split(o.log, same_site(site, o.log), o.entries, opened=opened) for o in seen]
    _enclosed(parts)
    sliced = _sliced(parts, solution, [o.out for o in seen], body, seen[0].entries)
    check_assigned(site, sliced.kept, [*(o.log for o in seen), *more])
    log = seen[0].log
    given = log.tensors[sliced.input_slot]
    call = SlicedCall(
        binder=Binder(getattr(site.module, site.method)),
        sliced=sliced,
        form=solution.form,
        num_slots=solution.num_slots,
        rank=given.dim(),
        dtype=given.dtype,
        experts=body.experts,
        inputs=body.inputs,
        width=given.shape[-1],
        ids=_ids(log, solution, body),
        places=solution.places,
        scale=solution.scale,
        spread=solution.spread,
    )
    # What made an expert run while observing is compared by value too: a rare expert may be treated as none other is.
    reached = [_given(site, found) for found in (*(o.log for o in seen), *more)]
    return Lifted(
        name=site.path,
        kind="ffn" if solution.form is None else "moe",
        cut="slice",
        module=site.module,
        method=site.method,
        call=call,
        body=body,
        region=_region(site.label or "model", log, solution, body, params),
        views=weight_views(body, site.path, dense=solution.form is None),
        replaced=replaced_by(site, [*(o.log for o in seen), *more], sliced.kept),
        evidence=(*evidence, f"runs as it is written, around the experts: {', '.join(sliced.around)}"),
        probes=partial(_probes, site, call, body, solution, params, given, reached),
        dtype=log.tensors[solution.x].dtype,
    )


def _sliced(
    parts: Sequence[Blocks], solution: Solution, outs: Sequence[int | None], body: Body, named: tuple[int, ...]
) -> Slice:
    """The slice that holds for all shapes.

    Operations such as einsum leave out sizes of one: what they do for others serves those too, which is verified.
    """
    try:
        return slice_block(parts, solution, outs, body, named)
    except NotLifted:
        shapes = [shape for _, shape in map(tokens_of, parts)]
        wide = [i for i, shape in enumerate(shapes) if 1 not in shape]
        if len(wide) == len(parts) or len(wide) < 3 or wide[0] != 0:
            raise
        return slice_block([parts[i] for i in wide], solution, [outs[i] for i in wide], body, named)


def check_assigned(site: Site, kept: Sequence[str], logs: Sequence[Log]) -> None:
    """Refuse a slice that would lose a call in which a submodule sets an attribute of its own."""
    lead = f"{site.path}." if site.path else ""
    for name in sorted(frozenset().union(*(log.contained for log in logs))):
        owner = name.rpartition(".")[0]
        inside = not lead or f"{owner}.".startswith(lead)
        called = any(f"{owner.removeprefix(lead)}.".startswith(f"{path}.") for path in kept)
        if inside and not called:
            raise NotLifted(f"the block sets attribute {name!r}")


def _region(name: str, log: Log, solution: Solution, body: Body, params: Mapping[str, torch.Tensor]) -> Region:
    dtype = common_dtype(body, params, log.tensors[solution.x].dtype)
    if solution.form is None:
        return lift_dense(name, body, dtype=dtype)
    weight_dtype = dtype if solution.weights is None else DTYPES[log.tensors[solution.weights].dtype]
    if solution.form in CHOSEN:
        return lift_chosen(name, body, dtype=dtype, weight_dtype=weight_dtype, on_input=solution.on_input)
    return lift_moe(
        name, body, slots=solution.num_slots, dtype=dtype, weight_dtype=weight_dtype, on_input=solution.on_input
    )


def _ids(log: Log, solution: Solution, body: Body) -> Ids | None:
    if solution.form not in ("indices", "unit") or solution.selector is None:
        return None
    return Ids.seen(log.value(solution.selector), body.experts)


def _given(site: Site, log: Log) -> dict[str, torch.Tensor]:
    """The tensors the site was called with, by name."""
    found = same_site(site, log)
    bound = Binder(getattr(site.module, site.method))(found.args, found.kwargs)
    return {name: value.clone() for name, value in tensors_of(log, bound, found.start).items()}


def _enclosed(parts: Sequence[Blocks]) -> None:
    if any(p.site.start > p.first or p.site.end <= p.last for p in parts):
        raise NotLifted("the block does not hold its experts at every shape")


def _probes(
    site: Site,
    call: SlicedCall,
    body: Body,
    solution: Solution,
    params: Mapping[str, torch.Tensor],
    given: torch.Tensor,
    reached: Sequence[Mapping[str, torch.Tensor]],
) -> Iterator[Probe]:
    sizes = counts(site.module, body, solution.num_slots)
    name, more = call.sliced.x_name, call.sliced.more
    made = (
        (label, {name: x, **{m.name: resized(reached[0][m.name], m.sizes(x.shape)) for m in more}})
        for label, x in inputs(given.dim(), given.shape[-1], given.dtype, given.device, sizes)
    )
    for label, tensors in (*made, *((f"observed input {i}", tensors) for i, tensors in enumerate(reached))):
        bound = {**call.sliced.others, **tensors}
        args, kwargs = call.binder.unbind(bound)
        yield Probe(
            label,
            args,
            kwargs,
            None
            if given.dtype in (torch.float32, torch.float64)
            else _judge(site, call, body, solution, params, args, kwargs),
        )


def _judge(
    site: Site,
    call: SlicedCall,
    body: Body,
    solution: Solution,
    params: Mapping[str, torch.Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Callable[[], torch.Tensor]:
    """The block with its experts evaluated in fp32."""

    def exact(rows: torch.Tensor, *routing: torch.Tensor) -> tuple[torch.Tensor]:
        if not routing:
            return (body.expert(params, 0, rows.float()),)
        if solution.form in CHOSEN:
            tokens, weights = routing
            routing = slots_of(CHOSEN[0], tokens, weights, rows.shape[0], body.experts)
        return (body.evaluate(params, rows, *routing, on_input=solution.on_input),)

    def run() -> torch.Tensor:
        result = call(site.module, exact, args, kwargs)
        return next(t for t in tree_flatten(result)[0] if isinstance(t, torch.Tensor)).float()

    return run
