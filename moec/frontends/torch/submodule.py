"""The submodule cut: a call that takes x, the chosen experts and their weights, lifted with probes of its own.

T tokens, K experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from moec.frontends.torch.binding import Binder
from moec.frontends.torch.body import Body
from moec.frontends.torch.calls import DirectCall
from moec.frontends.torch.direct import Roles, steering_reads, tensors_of
from moec.frontends.torch.dropped import check_direct, idle_clamps
from moec.frontends.torch.effects import Watch
from moec.frontends.torch.ids import Ids, understood
from moec.frontends.torch.instances import NotLifted, check_masks
from moec.frontends.torch.lift import DTYPES, common_dtype, lift_moe
from moec.frontends.torch.lifted import Lifted
from moec.frontends.torch.observe import tokens as random_tokens
from moec.frontends.torch.observe import users_code
from moec.frontends.torch.oplog import Log, Ref, Site
from moec.frontends.torch.probing import Maker, counts, inputs, is_cheap, routing, shape_for
from moec.frontends.torch.recorder import record
from moec.frontends.torch.replaced import replaced_call
from moec.frontends.torch.routedslice import Reading
from moec.frontends.torch.rowmasks import idle_masks
from moec.frontends.torch.sides import is_scaled_through, on_input_by_sign
from moec.frontends.torch.sizes import Size, solve
from moec.verify import Probe


def lift_submodule(
    log: Log,
    site: Site,
    roles: Roles,
    reading: Reading,
    params: Mapping[str, torch.Tensor],
    read: Callable[[Log], Reading],
) -> Lifted:
    """The layer as a call of this site with these roles. Raises NotLifted with the reason why it is not."""
    body = reading.body
    binder = Binder(getattr(site.module, site.method))
    bound = binder(site.args, site.kwargs)
    # The choice of experts is read by any loop over them; dense weights are a choice too.
    values = [roles.x, roles.weights] if roles.form != "dense" and roles.weights is not None else [roles.x]
    chosen = bound[roles.selector].slot if roles.form in ("indices", "unit") and roles.selector is not None else None
    idle = frozenset() if chosen is None else idle_clamps(log, site, chosen, body.experts)
    check_direct(log, site, body.params, reading.entries, idle)
    steered = steering_reads(log, site, [bound[name].slot for name in values])
    if steered:
        raise NotLifted(steered)
    _check_masks(log, site, reading, roles, bound)
    maker = Maker(roles, {**bound, **tensors_of(log, bound, site.start)}, body)
    roles = _told_apart(site, maker, params)
    maker = replace(maker, roles=roles)
    body, full = _every_expert(site, maker, body, read, roles.selector if idle else None)
    # Of a call that clamps its ids the caller sees what becomes of others: those calls are the original's.
    clamped = Ids(0, body.experts - 1), 0
    ids, identities = clamped if idle else understood(getattr(site.module, site.method), maker, params)
    body = replace(body, identities=identities)
    maker = replace(maker, body=body)
    x = maker.template[roles.x]
    dtype = common_dtype(body, params, x.dtype)
    weight_dtype = maker.template[roles.weights].dtype if roles.weights else x.dtype
    call = DirectCall(
        binder=binder,
        roles=roles,
        others={k: v for k, v in bound.items() if k not in roles.tensors},
        dtype=x.dtype,
        experts=body.experts,
        inputs=body.inputs,
        out_shapes={x.dim(): _result_shape(site, binder, maker, x, roles, body)},
        weight_dtype=weight_dtype,
        ids=ids if roles.form in ("indices", "unit") else None,
    )
    return replaced_call(
        site=site,
        call=call,
        body=body,
        region=lift_moe(
            site.label or "model",
            body,
            slots=roles.slots,
            dtype=dtype,
            weight_dtype=DTYPES[weight_dtype],
            on_input=roles.on_input,
        ),
        logs=[log, full],
        evidence=_evidence(site, roles, body),
        probes=partial(_probes, site, binder, maker, body, roles, x, weight_dtype, params),
        dtype=x.dtype,
    )


def _check_masks(log: Log, site: Site, reading: Reading, roles: Roles, bound: Mapping[str, Any]) -> None:
    """Refuse masks between the layers and around them that the ids given to the call do not explain."""
    ids = bound[roles.selector].slot if roles.selector is not None and roles.form in ("indices", "unit") else None

    def is_ids(slot: int) -> bool:
        return ids is not None and log.storages[slot] == log.storages[ids]

    assert isinstance(site.result, Ref)
    around = log.closure([(site.result.slot, site.end)], start=site.start).difference(reading.entries)
    check_masks(log, reading.masks, is_ids, reading.body.experts, idle_masks(log, around))


def _told_apart(site: Site, maker: Maker, params: Mapping[str, torch.Tensor]) -> Roles:
    """The roles, with the side that the weights act on asked for where the observed call does not tell it."""
    roles, body, x = maker.roles, maker.body, maker.template[maker.roles.x]
    weighted = roles.weights
    if weighted is None or roles.form == "dense" or not is_scaled_through(body, params, x):
        return roles
    rows = x.reshape(-1, body.inputs)
    experts, weights = maker.effective(maker.template)
    binder = Binder(getattr(site.module, site.method))

    def ask(signs: torch.Tensor) -> torch.Tensor:
        given = maker.template[weighted]
        args, kwargs = binder.unbind({**maker.template, weighted: given * signs.reshape(given.shape)})
        result: torch.Tensor = getattr(site.module, site.method)(*args, **kwargs)
        return result

    if roles.spread:
        raise NotLifted("one choice a sequence and weights whose side cannot be told")
    return replace(roles, on_input=on_input_by_sign(body, params, rows, experts, weights, ask))


def _evidence(site: Site, roles: Roles, body: Body) -> tuple[str, ...]:
    given = ", ".join((roles.x, roles.selector or "-", roles.weights or "-"))
    spread = ", once for each sequence" if roles.spread else ""
    return (
        f"{site.label}({given}) is y = sum of w * f(x), routing given as {roles.form}{spread}",
        f"{body.experts} experts, all of them run and unified; {roles.slots} per token",
        *([f"{body.identities} more experts return their input"] if body.identities else []),
        f"between the layers: {body.between}" if body.activation else "experts of one matrix",
        *([f"behind the last layer: {body.tail}"] if body.tail else []),
    )


def _every_expert(
    site: Site, maker: Maker, body: Body, read: Callable[[Log], Reading], clamped: str | None
) -> tuple[Body, Log]:
    """Run the call with every expert chosen and unify them all; its effects refuse it.

    It may write to the ids called `clamped`, if they stay what they are.
    """
    count = max(2, -(-body.experts // maker.roles.slots))
    x = maker.template[maker.roles.x]
    shape = shape_for(x.dim(), count + count % 2, body.inputs)
    if maker.roles.spread:  # a sequence for each expert; one token more keeps the sizes apart
        shape = (body.experts, body.experts + 1, body.inputs)
    rows = random_tokens(shape, x.dtype, 3, device=x.device)
    count = rows.numel() // body.inputs
    experts = routing(count, maker.roles.slots, body.experts, 0, "round robin").to(x.device)
    made = maker(rows, experts, torch.rand(experts.shape, device=x.device) + 0.1)
    args, kwargs = Binder(getattr(site.module, site.method)).unbind(made)
    given = [t for name, t in made.items() if isinstance(t, torch.Tensor) and name != clamped]
    kept = [] if clamped is None else [(made[clamped], made[clamped].clone())]
    watch = Watch(site.module, given, hear=True)
    try:
        with users_code(site.label):
            log = record(site.module, args, kwargs, path=site.path, method=site.method)
        effects = watch.changes()
    finally:
        watch.undo()
    if not all(torch.equal(ids, before) for ids, before in kept):
        effects = ["changes its input in place"]
    if effects:
        raise NotLifted(f"{site.label} {effects[0]}")
    full = read(log)
    if len(full.reached) < full.body.experts:
        raise NotLifted(f"only {len(full.reached)} of {full.body.experts} experts ran although all were chosen")
    return full.body, log


def _result_shape(
    site: Site, binder: Binder, maker: Maker, x: torch.Tensor, roles: Roles, body: Body
) -> tuple[int | Size, ...]:
    """The result's shape as expressions of the input's sizes, from three calls."""
    method = getattr(site.module, site.method)
    shapes, results = [], []
    for dims in ((2, 3), (3, 5), (1, 7)):
        shape = (*dims, body.inputs) if x.dim() == 3 else (dims[0] * dims[1], body.inputs)
        rows = random_tokens(shape, x.dtype, 4, device=x.device)
        experts = routing(rows.numel() // body.inputs, roles.slots, body.experts, 1, "random").to(x.device)
        args, kwargs = binder.unbind(maker(rows, experts, torch.rand(experts.shape, device=x.device)))
        with torch.no_grad(), users_code(site.label):
            out = method(*args, **kwargs)
        if out.dtype != x.dtype:
            raise NotLifted(f"the result is {out.dtype}, the input {x.dtype}")
        shapes.append(tuple(rows.shape))
        results.append(tuple(out.shape))
    sizes = [solve([r[i] for r in results], shapes) for i in range(len(results[0]))]
    if any(s is None for s in sizes):
        raise NotLifted("the result's shape does not follow from the input's")
    return tuple(s for s in sizes if s is not None)


def _patterns(patterns: tuple[str, ...], index: int, x: torch.Tensor, body: Body, slots: int) -> tuple[str, ...]:
    count = x.numel() // body.inputs
    return patterns if count > 100 and is_cheap(body, slots, count) else (patterns[index % len(patterns)],)


def _probes(
    site: Site,
    binder: Binder,
    maker: Maker,
    body: Body,
    roles: Roles,
    like: torch.Tensor,
    weight_dtype: torch.dtype,
    params: Mapping[str, torch.Tensor],
) -> Iterator[Probe]:
    sizes, device = counts(site.module, body, roles.slots), like.device
    patterns = ("random", "one expert", "round robin")
    made_inputs = inputs(like.dim(), body.inputs, like.dtype, device, sizes)
    # Capacities show only with many tokens and skew: those get every pattern.
    asked = (
        (p, label, x) for i, (label, x) in enumerate(made_inputs) for p in _patterns(patterns, i, x, body, roles.slots)
    )
    for i, (pattern, label, x) in enumerate(asked):
        count = x.numel() // body.inputs
        experts = routing(count, roles.slots, body.choices, i, pattern).to(device)
        generator = torch.Generator().manual_seed(i)
        weights = torch.rand(experts.shape, generator=generator).to(device, weight_dtype)
        if roles.form == "unit":
            weights = torch.ones_like(weights)
        made = maker(x, experts, weights)
        args, kwargs = binder.unbind(made)
        if roles.spread:
            experts, weights = maker.effective(made)

        def judge(
            x: torch.Tensor = x, experts: torch.Tensor = experts, weights: torch.Tensor = weights
        ) -> torch.Tensor:
            rows = x.reshape(-1, body.inputs)
            return body.evaluate(params, rows, experts, weights * roles.scale, on_input=roles.on_input)

        yield Probe(f"{label}, {pattern} routing", args, kwargs, judge)
