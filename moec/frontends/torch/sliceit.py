"""Analysis of a block as a slice: observe it at several shapes until every expert has run, solve, slice, and make it callable.

B sequences, S positions, T = B * S tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_flatten

from moec.frontends.torch.binding import Binder
from moec.frontends.torch.body import Body
from moec.frontends.torch.calls import SlicedCall
from moec.frontends.torch.instances import NotLifted
from moec.frontends.torch.items import Blocks, split
from moec.frontends.torch.lift import DTYPES, lift_dense, lift_moe, weight_views
from moec.frontends.torch.lifted import Lifted
from moec.frontends.torch.observe import Driver
from moec.frontends.torch.observe import tokens as random_tokens
from moec.frontends.torch.oplog import Log, Ref, Site
from moec.frontends.torch.probing import counts, inputs
from moec.frontends.torch.sliced import slice_block
from moec.frontends.torch.solve import Solution
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
    x = _input(driver)
    for i, (batch, length) in enumerate(SHAPES):
        shape = (batch, length, x.shape[-1]) if x.dim() == 3 else (batch * length, x.shape[-1])
        yield driver.with_input(random_tokens(shape, x.dtype, 20 + i, device=x.device)).observe()


def _input(driver: Driver) -> torch.Tensor:
    found = [v for v in tree_flatten((driver.args, driver.kwargs))[0] if isinstance(v, torch.Tensor)]
    if len(found) != 1 or found[0].dim() not in (2, 3) or not found[0].is_floating_point():
        raise NotLifted("a block is sliced when it takes one tensor [T, D] or [B, S, D]")
    return found[0]


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
) -> Lifted:
    """The lifted layer that slices `site`; the solution is for the first log."""
    parts = [split(o.log, same_site(site, o.log), [i for i in o.entries]) for o in seen]
    _enclosed(parts)
    sliced = slice_block(parts, solution, params, [o.out for o in seen])
    log = seen[0].log
    x_value, given = log.tensors[solution.x], log.tensors[sliced.input_slot]
    dtype = x_value.dtype
    if dtype not in DTYPES or any(params[n].dtype != dtype for n in body.params):
        raise NotLifted(f"weights and the experts' input are of different dtypes ({dtype})")
    binder = Binder(getattr(site.module, site.method))
    call = SlicedCall(
        binder,
        sliced,
        solution.form,
        solution.num_slots,
        given.dim(),
        given.dtype,
        body.experts,
        body.inputs,
        given.shape[-1],
    )
    routed = solution.form is not None
    weight_dtype = log.tensors[solution.weights].dtype if solution.weights is not None else dtype
    name = site.label or "model"
    if routed:
        region = lift_moe(
            name,
            body,
            slots=solution.num_slots,
            dtype=DTYPES[dtype],
            weight_dtype=DTYPES[weight_dtype],
            on_input=solution.on_input,
        )
    else:
        region = lift_dense(name, body, dtype=DTYPES[dtype])

    def probes() -> Iterator[Probe]:
        yield from _probes(site, call, body, solution, params, given)

    return Lifted(
        site.path, "moe" if routed else "ffn", "slice", site.module, site.method, call, body, region,
        weight_views(body, site.path, dense=not routed), _replaced(parts[0]), tuple(evidence), probes, dtype, sliced.text,
    )  # fmt: skip


def _enclosed(parts: Sequence[Blocks]) -> None:
    if any(p.site.start > p.first or p.site.end <= p.last for p in parts):
        raise NotLifted("the block does not hold its experts at every shape")


def _replaced(blocks: Blocks) -> tuple[str, ...]:
    """Submodules whose calls the slice replaces, relative to the block."""
    prefix = f"{blocks.site.path}." if blocks.site.path else ""
    inside = [
        s
        for s in blocks.log.sites
        if s.start >= blocks.site.start and s.end <= blocks.site.end and s.end > blocks.first and s.start <= blocks.last
    ]
    paths = {s.path.removeprefix(prefix) for s in inside if s.path.startswith(prefix) and s.path != blocks.site.path}
    return tuple(sorted(paths))


def _probes(
    site: Site,
    call: SlicedCall,
    body: Body,
    solution: Solution,
    params: Mapping[str, torch.Tensor],
    given: torch.Tensor,
) -> Iterator[Probe]:
    sizes = counts(site.module, body, solution.num_slots)
    for label, x in inputs(given.dim(), given.shape[-1], given.dtype, given.device, sizes):
        bound = {**call.sliced.others, call.sliced.x_name: x}
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
    args: object,
    kwargs: object,
):  # type: ignore[no-untyped-def]
    """The block with its experts evaluated in fp32."""

    def exact(rows: torch.Tensor, *routing: torch.Tensor) -> tuple[torch.Tensor]:
        if not routing:
            return (body.expert(params, 0, rows.float()),)
        return (body.evaluate(params, rows, *routing, on_input=solution.on_input),)

    def run() -> torch.Tensor:
        result = call(site.module, exact, args, kwargs)  # type: ignore[arg-type]
        return next(t for t in tree_flatten(result)[0] if isinstance(t, torch.Tensor)).float()

    return run


def first_result(log: Log, site: Site) -> torch.Tensor | None:
    """The first tensor a site returned."""
    slot = next((leaf.slot for leaf in tree_flatten(site.result)[0] if isinstance(leaf, Ref)), None)
    return None if slot is None else log.value(slot, site.end)
