"""The lowest cut for experts that take their rows by position: a call that is nothing but y[e] = f_e(x[e]).

E experts, T rows of all experts together, D inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from moec.frontends.torch.binding import Binder
from moec.frontends.torch.body import Body
from moec.frontends.torch.calls import PlacedCall
from moec.frontends.torch.direct import near, others_unread, steering_reads, tensors_of
from moec.frontends.torch.dropped import check_direct
from moec.frontends.torch.effects import Watch
from moec.frontends.torch.instances import NotLifted, check_masks
from moec.frontends.torch.lift import DTYPES, common_dtype, lift_moe
from moec.frontends.torch.lifted import Lifted
from moec.frontends.torch.observe import users_code
from moec.frontends.torch.oplog import Log, Ref, Site
from moec.frontends.torch.places import Places, placements, predicted, theirs
from moec.frontends.torch.probing import counts, inputs, shape_for
from moec.frontends.torch.recorder import record
from moec.frontends.torch.replaced import replaced_call
from moec.frontends.torch.routedslice import Reading
from moec.verify import Probe


def fit_places(log: Log, site: Site, body: Body, params: Mapping[str, torch.Tensor]) -> tuple[str, Places] | None:
    """The argument that holds the experts' rows, and how, if the call gives each expert's results and nothing else."""
    result = log.value(site.result.slot, site.end) if isinstance(site.result, Ref) else None
    if result is None or not result.is_floating_point():
        return None
    loose = 1e-4 if result.dtype in (torch.float32, torch.float64) else 4e-2
    bound = Binder(getattr(site.module, site.method))(site.args, site.kwargs)
    for name, x in tensors_of(log, bound, site.start).items():
        if not x.is_floating_point() or not x.numel():
            continue
        for places in placements(x, result.shape, body.experts, body.inputs, body.outputs):
            mine = predicted(partial(body.expert, params), places, x, body.experts)
            if near(mine, theirs(places, result, body.outputs), loose) and others_unread(log, site, (name,)):
                return name, places
    return None


def lift_placed(
    log: Log,
    site: Site,
    found: tuple[str, Places],
    reading: Reading,
    params: Mapping[str, torch.Tensor],
    read: Callable[[Log], Reading],
) -> Lifted:
    """The layer that replaces the call. Raises NotLifted with the reason."""
    (name, places), body = found, reading.body
    binder = Binder(getattr(site.module, site.method))
    bound = binder(site.args, site.kwargs)
    check_direct(log, site, body.params, reading.entries)
    check_masks(log, reading.masks, lambda slot: False, body.experts)  # no ids that could explain one
    steered = steering_reads(log, site, [bound[name].slot])
    if steered:
        raise NotLifted(steered)
    template = {**bound, **tensors_of(log, bound, site.start)}
    x = template[name]
    others = {key: value for key, value in bound.items() if key != name}
    call = PlacedCall(binder, name, others, x.dtype, body.experts, body.inputs, x.dim(), places)

    def ask(rows: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return binder.unbind({**template, name: rows})

    again = _again(site, ask(next(_rows(call, x, [3]))[1]), read)
    if again.body != body or len(again.reached) < body.experts:
        raise NotLifted("the experts compute different things for different inputs")
    dtype = common_dtype(body, params, x.dtype)

    def probes() -> Iterator[Probe]:
        for label, rows in _rows(call, x, counts(site.module, body, body.experts)):
            exact = partial(_exact, body, params, places, rows)
            yield Probe(label, *ask(rows), exact)

    return replaced_call(
        site=site,
        call=call,
        body=body,
        region=lift_moe(
            site.label or "model", body, slots=1, dtype=dtype, weight_dtype=DTYPES[x.dtype], on_input=False
        ),
        logs=[log],
        evidence=(
            f"{site.label}({name}) is y[e] = f_e(x[e]), rows given by their places: {places.text()}",
            f"{body.experts} experts, all of them run and unified",
            f"between the layers: {body.between}" if body.activation else "experts of one matrix",
        ),
        probes=probes,
        dtype=x.dtype,
    )


def _again(site: Site, given: tuple[tuple[Any, ...], dict[str, Any]], read: Callable[[Log], Reading]) -> Reading:
    """What a run on other rows shows; its effects refuse it."""
    watch = Watch(site.module, [t for t in (*given[0], *given[1].values()) if isinstance(t, torch.Tensor)])
    try:
        with users_code(site.label):
            log = record(site.module, *given, path=site.path, method=site.method)
        effects = watch.changes()
    finally:
        watch.undo()
    if effects:
        raise NotLifted(f"{site.label} {effects[0]}")
    return read(log)


def _rows(call: PlacedCall, like: torch.Tensor, sizes: list[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """Labelled x of the observed rank, with `sizes` rows for each expert."""
    axis = call.places.x_axis
    if axis is None:
        yield from inputs(call.rank, call.inputs, like.dtype, like.device, sizes)
        return
    for label, rows in inputs(2, call.inputs, like.dtype, like.device, [n * call.experts for n in sizes]):
        each = len(rows) // call.experts
        rank = call.rank - call.places.span + 1
        lead = shape_for(rank - 1, each, call.inputs)[:-1] if rank > 3 else (each,)
        counted = call.places.sizes or (call.experts,)
        shaped = rows[: each * call.experts].reshape(*counted, *lead, call.inputs)
        axes = tuple(range(call.places.span))
        yield label.replace("tokens", "rows"), shaped.movedim(axes, tuple(axis + i for i in axes)).contiguous()


def _exact(body: Body, params: Mapping[str, torch.Tensor], places: Places, x: torch.Tensor) -> torch.Tensor:
    """The call's result in fp32."""
    y = predicted(partial(body.expert, params), places, x, body.experts)
    return places.back(y, places.shape(x.shape, body.experts, body.outputs))
