"""Banks: each weight of the expert body for all experts, completed from the parameters' geometry.

A probe reaches some experts; the banks hold all of them, so that none is left out. Whether an expert that was not
reached computes the same is checked by forcing every expert to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moec.frontends.torch.instances import Instance, NotLifted, roles, signature
from moec.frontends.torch.oplog import Log
from moec.weights import View

VECTORS = ("_tail", "_scale")
"""How the roles of vectors end that all experts may share."""


@dataclass(frozen=True)
class Bank:
    """One weight of the body, for each of E experts (or for the one dense layer)."""

    role: str
    views: tuple[View, ...]

    @property
    def shared(self) -> bool:
        """Whether one view serves all experts, as vectors between and behind the layers may."""
        return self.role.endswith(VECTORS) and len(self.views) == 1

    @property
    def shape(self) -> tuple[int, ...]:
        return self.views[0].shape


def unify(
    log: Log, module: torch.nn.Module, prefix: str, instances: Sequence[Instance], params: dict[str, torch.Tensor]
) -> list[Bank]:
    """One bank per role over all experts; raises NotLifted where experts differ."""
    signatures = [signature(log, instance) for instance in instances]
    odd = next((i for i, s in enumerate(signatures) if not s.same(signatures[0])), None)
    if odd is not None:
        first, other = (roles(instances[i])["w_up0"] for i in (0, odd))
        raise NotLifted(f"experts differ: {_place(first)} and {_place(other)} go through different operations")
    found = [roles(i) for i in instances]
    shared = [Bank(role, (view,)) for role, view in found[0].items() if _is_shared(role, found, params)]
    one_for_all = {bank.role for bank in shared}
    found = [{role: view for role, view in f.items() if role not in one_for_all} for f in found]
    banks = [Bank(role, complete([f[role] for f in found], module, prefix, params)) for role in found[0]]
    # One stack may have more places than another: only what all of them have can be an expert.
    count = min(len(bank.views) for bank in banks)
    banks = [Bank(bank.role, bank.views[:count]) for bank in banks]
    index = {bank.role: {v: e for e, v in enumerate(bank.views)} for bank in banks}
    for f in found:
        places = {index[role].get(view) for role, view in f.items()}
        if len(places) != 1 or None in places:
            raise NotLifted("an expert takes its weights from several places of the stacks")
    return [*banks, *shared]


def _is_shared(role: str, found: Sequence[dict[str, View]], params: dict[str, torch.Tensor]) -> bool:
    """Whether a norm behind the experts, or a scale of their hidden values, reads one whole vector for all of them."""
    views = {f[role] for f in found}
    return role.endswith(VECTORS) and len(views) == 1 and _one_per_module(found[0][role], params)


def _place(view: View) -> str:
    return f"{view.param!r} from element {view.offset}"


def complete(
    views: Sequence[View], module: torch.nn.Module, prefix: str, params: dict[str, torch.Tensor]
) -> tuple[View, ...]:
    """The views of all experts, from those seen."""
    if len({v.param for v in views}) == 1 and not _one_per_module(views[0], params):
        return _stacked(views[0], params[views[0].param])
    return _listed(views, module, prefix, params)


def _one_per_module(view: View, params: dict[str, torch.Tensor]) -> bool:
    return params[view.param].numel() == _numel(view)


def _numel(view: View) -> int:
    count = 1
    for n in view.shape:
        count *= n
    return count


def _stacked(view: View, param: torch.Tensor) -> tuple[View, ...]:
    size = _numel(view)
    rest, step = param.numel() // size, size
    if param.dim() == len(view.shape) + 1 and param.numel() == param.shape[0] * size:
        rest, step = param.shape[0], param.stride(0)
    elif (
        param.numel() % size
        or not param.is_contiguous()
        or max(n * s for n, s in zip(view.shape, view.stride, strict=True)) > size
    ):
        raise NotLifted(f"parameter {view.param!r} of shape {tuple(param.shape)} is not an even stack of experts")
    base = view.offset % step
    return tuple(View(view.param, base + e * step, view.shape, view.stride) for e in range(rest))


def _listed(
    views: Sequence[View], module: torch.nn.Module, prefix: str, params: dict[str, torch.Tensor]
) -> tuple[View, ...]:
    """Experts as siblings in one container: the one part of the name that varies is the expert."""
    names = [v.param.split(".") for v in views]
    spread = [i for i, parts in enumerate(zip(*names, strict=False)) if len(set(parts)) > 1]
    if len({len(n) for n in names}) > 1 or len(spread) > 1:
        raise NotLifted(f"experts' weights {views[0].param!r} and {views[-1].param!r} are not siblings")
    if not spread:
        raise NotLifted(f"only one expert's weights ({views[0].param!r}) were seen, or experts share their parameters")
    at = spread[0]
    head, tail = names[0][:at], names[0][at + 1 :]
    container = module.get_submodule(".".join(head)[len(prefix) :].lstrip(".")) if head else module
    keys = list(container._modules) if tail else list(container._parameters)
    full = {key: ".".join([*head, key, *tail]) for key in keys}
    keys = [key for key in keys if full[key] in params]
    first = params[views[0].param]
    for key in keys:
        other = params[full[key]]
        if other.shape != first.shape or other.stride() != first.stride() or other.dtype != first.dtype:
            here, there = f"{full[key]!r} is {tuple(other.shape)}", f"{views[0].param!r} is {tuple(first.shape)}"
            raise NotLifted(f"experts differ in width: {here}, {there}")
    if len({params[full[key]].data_ptr() for key in keys}) < len(keys):
        raise NotLifted("experts share their parameters")
    if {v.param for v in views} - set(full.values()):
        raise NotLifted("experts' weights are not all in one container")
    model = views[0]
    return tuple(View(full[key], model.offset, model.shape, model.stride) for key in keys)
