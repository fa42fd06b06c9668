"""From a live model to its lifted layers, and the reason for each candidate that is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from moec.errors import MoecError
from moec.frontends.torch.dense import NoMixture, analyse_dense
from moec.frontends.torch.discover import (
    Candidate,
    discover_ffn,
    discover_moe,
    discover_outer,
    is_widening,
    passed_over,
    together,
)
from moec.frontends.torch.ffn import NotRun, analyse_ffn
from moec.frontends.torch.instances import Chained, NotLifted
from moec.frontends.torch.lifted import Lifted
from moec.frontends.torch.lookups import discover_lookups, looked_up
from moec.frontends.torch.moe import analyse_moe
from moec.frontends.torch.observe import Drivers, raised
from moec.frontends.torch.refuse import check_weights, computed_owner, is_lazy, unreadable


@dataclass(frozen=True)
class Refused:
    """A candidate that is left alone."""

    name: str
    kind: Literal["moe", "ffn"]
    reason: str
    tried: tuple[str, ...] = ()


@dataclass
class Analysis:
    """What the front end found, in the order of the model's modules."""

    lifted: list[Lifted] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    result: Any = None


def candidates(model: nn.Module) -> list[Candidate]:
    """Everything that will be looked at, if every MoE candidate is one."""
    if is_lazy(model):
        return []
    moes = discover_moe(model)
    return [*moes, *discover_ffn(model, set().union(*(c.weights for c in moes)))]


def analyse(
    model: nn.Module, example: tuple[tuple[Any, ...], dict[str, Any]] | None, progress: Callable[[str], None]
) -> Analysis:
    """Look at every candidate of a model in eval mode. MoecError (MOEC211) when the model does not run on `example`."""
    found = Analysis()
    # Buffers serve a sliced block's own operations; weights are looked for among the candidates' parameters only.
    params = {
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }
    drivers = Drivers(model)
    if example is not None:
        try:
            found.result = drivers.capture(*example)
        except Exception as error:  # the user's model may raise anything
            raise MoecError(
                "MOEC211", f"the model does not run on example_inputs: {raised(error)}",
                hint="example_inputs is a tuple of positional or a dict of keyword arguments of the model's forward",
            ) from error  # fmt: skip
    found.refused += [Refused(name, "ffn", reason) for name, reason in unreadable(model)]
    if is_lazy(model):
        return found
    taken: set[str] = set()
    for attempts in together(discover_moe(model), params):
        taken |= _analyse_moe(model, attempts, drivers, params, found, progress)
    taken |= _analyse_dense(model, drivers, params, found, progress)
    # Modules may hold the very experts of others: what is taken is taken under all its names.
    held = {id(params[name]) for name in taken}
    taken |= {name for name, tensor in params.items() if id(tensor) in held}
    for candidate in discover_ffn(model, taken):
        progress(candidate.name)
        _analyse_ffn(model, candidate, drivers, params, found)
    for candidate in discover_lookups(model):
        reason = looked_up(candidate, drivers, params) if not candidate.weights & taken else None
        if reason is not None:
            found.refused.append(Refused(candidate.name, "moe", reason))
    looked_at = {*(one.name for one in found.lifted), *(one.name for one in found.refused)}
    for name, note in passed_over(model):
        if any(weight.startswith(f"{name}.") for one in found.lifted for weight in _weights(one)):
            continue
        if not any(f"{one}.".startswith(f"{name}.") or f"{name}.".startswith(f"{one}.") for one in looked_at if one):
            found.notes.append(note)
    return found


def _analyse_moe(
    model: nn.Module,
    attempts: Sequence[Candidate],
    drivers: Drivers,
    params: Mapping[str, torch.Tensor],
    found: Analysis,
    progress: Callable[[str], None],
) -> set[str]:
    """Look at candidates for the same weights, up to the first that is lifted; returns the weights that are taken.

    The reason that is reported is that of the first, which holds all of the weights, or of the part that has most.
    """
    refused: list[tuple[Candidate, NotLifted]] = []
    taken: set[str] = set()
    lifted: set[str] = set()
    for candidate in attempts:
        if candidate.weights <= taken or candidate.name in lifted:
            continue
        progress(candidate.name)
        try:
            check_weights(model, computed_owner(candidate.name), candidate.weights)
            found.lifted.append(analyse_moe(candidate, drivers, params))
            taken |= candidate.weights
            lifted.add(candidate.name)
        except NotLifted as reason:
            refused.append((candidate, reason))
    if refused and not taken:
        parts = [one for one in refused[1:] if one[0].name == refused[0][0].name]
        first, why = attempts[0], (parts or refused)[0][1]
        found.refused.append(Refused(computed_owner(first.name), "moe", str(why), why.tried))
        return set() if isinstance(why, Chained) else first.weights
    return taken


def _analyse_dense(
    model: nn.Module,
    drivers: Drivers,
    params: Mapping[str, torch.Tensor],
    found: Analysis,
    progress: Callable[[str], None],
) -> set[str]:
    """Look for dense mixtures where no other mixture was found; returns the weights that are taken."""
    refused = {one.name for one in found.refused if one.kind == "moe"}
    plain = [one for one in discover_moe(model) if computed_owner(one.name) in refused]
    candidates = [one for one in (*discover_outer(model), *plain) if _usable(model, one)]
    if not candidates:
        return set()
    offered = _plain_matrices(model).union(*(one.weights for one in candidates))
    offered = offered.difference(*(_weights(one) for one in found.lifted))
    taken: set[str] = set()
    for candidate in candidates:
        if not candidate.weights <= offered or any(_within(one.name, candidate.name) for one in found.lifted):
            continue
        progress(candidate.name)
        try:
            layer = analyse_dense(candidate, offered, drivers, params)
            check_weights(model, layer.name, _weights(layer).intersection(dict(model.named_parameters())))
        except NotLifted as reason:
            _say_more(found, candidate, reason)
            continue
        found.lifted.append(layer)
        offered -= _weights(layer)
        taken |= _weights(layer)
        # What was refused within it was a part of the experts, or stays a part of the block.
        found.refused = [one for one in found.refused if one.kind != "moe" or not _within(one.name, layer.name)]
    return taken


def _plain_matrices(model: nn.Module) -> set[str]:
    """Matrices that may be a mixture's beside a candidate's, such as those of an expert that is alone in its list."""
    named = model.named_parameters(remove_duplicate=False)
    return {
        name
        for name, p in named
        if p.dim() == 2 and type(p) is nn.Parameter and p.is_floating_point() and "parametrizations." not in name
    }


def _usable(model: nn.Module, candidate: Candidate) -> bool:
    try:
        check_weights(model, computed_owner(candidate.name), candidate.weights)
    except NotLifted:
        return False
    return True


def _weights(layer: Lifted) -> set[str]:
    """The parameters that a layer's experts read, by their names in the model."""
    lead = f"{layer.name}." if layer.name else ""
    each = (entry if isinstance(entry, tuple) else (entry,) for entry in layer.views.values())
    return {lead + view.param for entry in each for view in entry}


def _say_more(found: Analysis, candidate: Candidate, reason: NotLifted) -> None:
    """A dense mixture that cannot be cut says more about its experts than what was found before."""
    if isinstance(reason, NoMixture):
        return
    said = Refused(computed_owner(candidate.name), "moe", str(reason), reason.tried)
    for i, one in enumerate(found.refused):
        if (one.name, one.kind) == (said.name, "moe"):
            found.refused[i] = said
            return


def _within(inner: str, outer: str) -> bool:
    return not outer or inner == outer or inner.startswith(f"{outer}.")


def _analyse_ffn(
    model: nn.Module, candidate: Candidate, drivers: Drivers, params: Mapping[str, torch.Tensor], found: Analysis
) -> None:
    # A block that is compiled as a mixture may hold a plain FFN beside its experts; that one stays part of the block.
    mixtures = {layer.name for layer in found.lifted if layer.kind == "moe"}
    try:
        check_weights(model, computed_owner(candidate.name), candidate.weights)
        layers = analyse_ffn(candidate, drivers, params) or []
        taken = {(layer.name, layer.method) for layer in found.lifted}
        found.lifted += [layer for layer in layers if (layer.name, layer.method) not in taken]
        if any((layer.name, layer.method) in taken for layer in layers):
            found.notes.append(f"{candidate.name or 'the model'}: the FFN beside the experts runs as it is written")
    except NotLifted as reason:
        if candidate.name in mixtures:
            found.notes.append(f"{candidate.name or 'the model'}: the FFN beside the experts is left alone: {reason}")
        elif isinstance(reason, NotRun) and not is_widening(params[n] for n in candidate.weights):
            found.notes.append(f"{candidate.name} holds matrices like an FFN's but {reason}")
        else:
            tried = (f"{candidate.name or 'the model'}: {reason.whole}",) if reason.shown else ()
            found.refused.append(Refused(computed_owner(candidate.name), "ffn", str(reason), tried))
