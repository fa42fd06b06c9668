"""The lowest cut for expert choice: a call that takes x, the tokens that each expert chose, and their weights.

T tokens, E experts, C places of an expert, D inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from moec.frontends.torch.binding import Binder
from moec.frontends.torch.body import Body
from moec.frontends.torch.calls import ChosenCall
from moec.frontends.torch.direct import near, others_unread, steering_reads, tensors_of
from moec.frontends.torch.dropped import check_direct
from moec.frontends.torch.effects import Watch
from moec.frontends.torch.expertchoice import CHOSEN, forms, never_repeats, slots_of
from moec.frontends.torch.instances import NotLifted, check_masks
from moec.frontends.torch.lift import DTYPES, common_dtype, lift_chosen
from moec.frontends.torch.lifted import Lifted
from moec.frontends.torch.observe import tokens as random_tokens
from moec.frontends.torch.observe import users_code
from moec.frontends.torch.oplog import Log, Ref, Site
from moec.frontends.torch.probing import counts, inputs, shape_for
from moec.frontends.torch.recorder import record
from moec.frontends.torch.replaced import replaced_call
from moec.frontends.torch.routedslice import Reading
from moec.frontends.torch.rowmasks import idle_masks
from moec.frontends.torch.sides import chosen_on_input, is_scaled_through
from moec.verify import Probe


@dataclass(frozen=True)
class Choice:
    """Names of the arguments that are x, the ids of tokens and their weights; how the ids lie."""

    x: str
    ids: str
    weights: str
    form: str
    on_input: bool

    @property
    def names(self) -> tuple[str, str, str]:
        """All three."""
        return self.x, self.ids, self.weights


def fit_choice(log: Log, site: Site, body: Body, params: Mapping[str, torch.Tensor]) -> Choice | None:
    """The arguments under which the call is expert choice and nothing else, None where there are none."""
    result = log.value(site.result.slot, site.end) if isinstance(site.result, Ref) else None
    if result is None or not result.is_floating_point() or result.shape[-1:] != (body.outputs,):
        return None
    loose = 1e-4 if result.dtype in (torch.float32, torch.float64) else 4e-2
    bound = tensors_of(log, Binder(getattr(site.module, site.method))(site.args, site.kwargs), site.start)
    bound = {name: tensor for name, tensor in bound.items() if tensor.device == result.device}
    for found in _hypotheses(bound, body):
        x = bound[found.x]
        if result.shape[:-1] != x.shape[:-1]:
            continue
        mine = _exact(body, params, found, bound)
        if near(mine, result.reshape(mine.shape).float(), loose) and others_unread(log, site, found.names):
            return found
    return None


def _hypotheses(bound: Mapping[str, torch.Tensor], body: Body) -> Iterator[Choice]:
    floats = [name for name, value in bound.items() if value.is_floating_point()]
    for x in floats:
        if bound[x].dim() < 2 or bound[x].shape[-1] != body.inputs:
            continue
        for ids, value in bound.items():
            for form in forms(value, body.experts, bound[x].numel() // body.inputs):
                for weights in floats:
                    if weights != x and bound[weights].numel() == value.numel():
                        for on_input in (False, True):
                            yield Choice(x, ids, weights, form, on_input)


def _exact(
    body: Body, params: Mapping[str, torch.Tensor], found: Choice, bound: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """The call's result [T, O] in fp32."""
    rows = bound[found.x].reshape(-1, body.inputs)
    routing = slots_of(found.form, bound[found.ids], bound[found.weights], rows.shape[0], body.experts)
    return body.evaluate(params, rows, *routing, on_input=found.on_input)


def lift_choice(
    log: Log,
    site: Site,
    found: Choice,
    reading: Reading,
    params: Mapping[str, torch.Tensor],
    read: Callable[[Log], Reading],
) -> Lifted:
    """The layer that replaces the call. Raises NotLifted with the reason."""
    body, method = reading.body, getattr(site.module, site.method)
    binder = Binder(method)
    bound = binder(site.args, site.kwargs)
    check_direct(log, site, body.params, reading.entries)
    assert isinstance(site.result, Ref)
    around = log.closure([(site.result.slot, site.end)], start=site.start).difference(reading.entries)
    check_masks(log, reading.masks, lambda slot: False, body.experts, idle_masks(log, around))
    steered = steering_reads(log, site, [bound[found.x].slot, bound[found.weights].slot])
    if steered:
        raise NotLifted(steered)
    if not never_repeats(log, bound[found.ids].slot):
        raise NotLifted("an expert may choose a token twice: its choice is of no top-k or sort")
    template = {**bound, **tensors_of(log, bound, site.start)}
    x, weights = template[found.x], template[found.weights]
    if is_scaled_through(body, params, x):
        found = replace(found, on_input=_side(found, binder, method, template, body, params))
    ask = partial(_arguments, binder, template, found)
    _again(site, ask(*_given(x, weights, template[found.ids], found.form, body, 7, 3)), body, read)
    call = ChosenCall(
        binder=binder,
        x_name=found.x,
        tokens_name=found.ids,
        weights_name=found.weights,
        others={name: value for name, value in bound.items() if name not in found.names},
        form=found.form,
        dtype=x.dtype,
        weight_dtype=weights.dtype,
        experts=body.experts,
        inputs=body.inputs,
        rank=x.dim(),
        distinct=True,
    )
    dtype = common_dtype(body, params, x.dtype)
    region = lift_chosen(
        site.label or "model", body, dtype=dtype, weight_dtype=DTYPES[weights.dtype], on_input=found.on_input
    )
    return replaced_call(
        site=site,
        call=call,
        body=body,
        region=region,
        logs=[log],
        evidence=(
            f"{site.label}({', '.join(found.names)}) is y = sum of w * f(x), each expert given the tokens it chose",
            f"{body.experts} experts, all of them run and unified",
            f"between the layers: {body.between}" if body.activation else "experts of one matrix",
        ),
        probes=partial(_probes, site, ask, found, body, params, template),
        dtype=x.dtype,
    )


def _side(
    found: Choice,
    binder: Binder,
    method: Callable[..., torch.Tensor],
    template: Mapping[str, Any],
    body: Body,
    params: Mapping[str, torch.Tensor],
) -> bool:
    """Whether the weights act on the experts' input, asked with weights of both signs."""
    given = template[found.weights]

    def ask(signs: torch.Tensor) -> torch.Tensor:
        args, kwargs = binder.unbind({**template, found.weights: given * signs})
        return method(*args, **kwargs)

    rows = template[found.x].reshape(-1, body.inputs)
    return chosen_on_input(body, params, rows, found.form, template[found.ids], given, ask)


def _arguments(
    binder: Binder,
    template: Mapping[str, Any],
    found: Choice,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return binder.unbind({**template, found.x: x, found.ids: ids, found.weights: weights})


def _given(
    like: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    form: str,
    body: Body,
    count: int,
    places: int,
    x: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x with `count` tokens, and random choices of `places` of them by each expert, in the form."""
    if x is None:
        x = random_tokens(shape_for(like.dim(), count, body.inputs), like.dtype, 5, device=like.device)
    generator = torch.Generator().manual_seed(count + places)
    chosen = torch.stack([torch.randperm(count, generator=generator)[:places] for _ in range(body.experts)])
    gates = torch.rand(chosen.shape, generator=generator) + 0.1
    if form == CHOSEN[1]:
        chosen, gates = chosen.T.contiguous(), gates.T.contiguous()
    return x, chosen.to(ids.device, ids.dtype), gates.to(weights.device, weights.dtype)


def _again(
    site: Site, given: tuple[tuple[Any, ...], dict[str, Any]], body: Body, read: Callable[[Log], Reading]
) -> None:
    """Refuse a call that has effects on other rows, or whose experts compute something else there."""
    watch = Watch(site.module, [t for t in (*given[0], *given[1].values()) if isinstance(t, torch.Tensor)], hear=True)
    try:
        with users_code(site.label):
            log = record(site.module, *given, path=site.path, method=site.method)
        effects = watch.changes()
    finally:
        watch.undo()
    if effects:
        raise NotLifted(f"{site.label} {effects[0]}")
    again = read(log)
    if again.body != body or len(again.reached) < body.experts:
        raise NotLifted("the experts compute different things for different inputs")


def _probes(
    site: Site,
    ask: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]],
    found: Choice,
    body: Body,
    params: Mapping[str, torch.Tensor],
    template: Mapping[str, Any],
) -> Iterator[Probe]:
    like, weights, ids = (template[name] for name in (found.x, found.weights, found.ids))
    for label, x in inputs(like.dim(), body.inputs, like.dtype, like.device, counts(site.module, body, body.experts)):
        count = x.numel() // body.inputs
        for places in sorted({0, 1, max(1, count // 3), count}):
            given = _given(like, weights, ids, found.form, body, count, places, x)
            bound = dict(zip((found.x, found.ids, found.weights), given, strict=True))
            yield Probe(f"{label}, {places} for each expert", *ask(*given), partial(_exact, body, params, found, bound))
