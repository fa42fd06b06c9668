"""Bodies of more than two layers, or with batch norm between them: products, activations and affine maps in a row.

R rows, N outputs of a layer, E experts. In eval mode batch norm is an affine map of each feature by its buffers; it
stays one, read from the module's own tensors on each call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from moec.frontends.torch.activation import Activation
from moec.frontends.torch.banks import Bank
from moec.frontends.torch.body import Body, view_tensor, with_activation
from moec.frontends.torch.formula import Written
from moec.frontends.torch.instances import Instance, NotLifted
from moec.frontends.torch.linears import Linear, view_of
from moec.frontends.torch.oplog import Entry, Log, Ref
from moec.weights import View

Layers = tuple[tuple[Linear, ...], ...]
Middles = tuple[tuple[int, ...], ...]
_OPERANDS = {"running_mean": "mean", "running_var": "var", "weight": "scale", "bias": "shift"}


@dataclass(frozen=True)
class Affine:
    """Batch norm with statistics that are given: (x - mean) / sqrt(var + eps), times scale, plus shift."""

    place: str
    eps: float

    def __str__(self) -> str:
        return f"batch norm (eps {self.eps:g})"


@dataclass(frozen=True)
class Layer:
    """One product, by the ends of its roles' names: w_<place>, b_<place>."""

    place: str


Step = Layer | Affine | Activation | Written


@dataclass(frozen=True)
class Chain(Body):
    """A body of any number of layers; `steps` are applied in order. `activation` is None."""

    steps: tuple[Step, ...] = ()

    @property
    def outputs(self) -> int:
        last = next(step for step in reversed(self.steps) if isinstance(step, Layer))
        return self.banks[f"w_{last.place}"].shape[0]

    def expert(self, params: Mapping[str, torch.Tensor], index: int, rows: torch.Tensor) -> torch.Tensor:
        """f_index(rows): rows [R, C] -> [R, N], in rows' dtype."""

        def read(role: str) -> torch.Tensor | None:
            bank = self.banks.get(role)
            return None if bank is None else view_tensor(params, bank.views[index]).to(rows.dtype)

        for step in self.steps:
            if isinstance(step, Layer):
                weight = read(f"w_{step.place}")
                assert weight is not None
                rows = torch.nn.functional.linear(rows, weight, read(f"b_{step.place}"))
            elif isinstance(step, Affine):
                mean, var, scale, shift = (read(f"{name}_{step.place}") for name in ("mean", "var", "scale", "shift"))
                assert mean is not None
                assert var is not None
                rows = (rows - mean) * torch.rsqrt(var + step.eps)
                rows = rows if scale is None else rows * scale
                rows = rows if shift is None else rows + shift
            else:
                rows = step([rows])
        return rows

    def text(self) -> str:
        """What stands between the layers, for the evidence."""
        return "; ".join(str(step) for step in self.steps if not isinstance(step, Layer))


def is_batch_norm(entry: Entry) -> bool:
    """Whether the entry is any of the operations that torch has for batch norm."""
    return "batch_norm" in entry.name


def build_chain(log: Log, members: Sequence[tuple[Layers, Middles]], params: Mapping[str, torch.Tensor]) -> Chain:
    """The chain that all members are; members do the same operations. Raises NotLifted."""
    layers, middles = members[0]
    if any(len(layer) != 1 for layer in layers):
        raise NotLifted("gate and up in an expert of more than two layers")
    steps: list[Step] = []
    for i, (linear,) in enumerate(layers):
        steps.append(Layer(_place(i)))
        if i + 1 < len(layers):
            steps += _between(log, linear, layers[i + 1][0], middles[i], f"norm{i}")
    each = [_views(log, *member) for member in members]
    return Chain({role: Bank(role, tuple(views[role] for views in each)) for role in each[0]}, None, steps=tuple(steps))


def _place(index: int) -> str:
    return f"layer{index}" if index else "up0"


def _views(log: Log, layers: Layers, middles: Middles) -> dict[str, View]:
    """One member's weights by role."""
    views: dict[str, View] = {}
    for i, (linear,) in enumerate(layers):
        views[f"w_{_place(i)}"] = linear.weight
        if linear.bias is not None:
            views[f"b_{_place(i)}"] = linear.bias
        for index in middles[i] if i < len(middles) else ():
            if is_batch_norm(log.entries[index]):
                views |= _read_norm(log, log.entries[index], f"norm{i}")[1]
    return views


def _between(log: Log, before: Linear, after: Linear, middle: Sequence[int], place: str) -> list[Step]:
    """What stands between two layers: at most one batch norm, with an activation on either side."""
    norms = [i for i in middle if is_batch_norm(log.entries[i])]
    if len(norms) > 1:
        raise NotLifted("two batch norms in a row between an expert's layers")
    if not norms:
        found = _activation(log, before, after, middle)
        return [] if found is None else [found]
    entry = log.entries[norms[0]]
    affine, _, source = _read_norm(log, entry, place)
    ahead = [i for i in middle if i < entry.index]
    behind = [i for i in middle if i > entry.index]
    first = _activation(log, before, replace(after, source=source), ahead)
    normed = replace(before, out=entry.results[0], weight=View("", 0, (log.tensors[source].shape[-1], 1), (1, 1)))
    second = _activation(log, normed, after, behind)
    return [step for step in (first, affine, second) if step is not None]


def _activation(log: Log, before: Linear, after: Linear, middle: Sequence[int]) -> Activation | Written | None:
    """The activation between two values, None where they are one and the same, also written to by nobody."""
    if not middle and before.out == after.source:
        return None
    body = with_activation(log, Instance((before,), after, tuple(middle)), {})
    activation = body.activation
    if activation is None or (isinstance(activation, Written) and activation.gated):
        raise NotLifted("gate and up in an expert of more than two layers")
    return activation


def _read_norm(log: Log, entry: Entry, place: str) -> tuple[Affine, dict[str, View], int]:
    """The map, the tensors it reads by role, and its rows. Raises NotLifted where it is no map of each row."""
    names = [argument.name for argument in entry.op._schema.arguments]
    given = {**dict(zip(names, entry.args, strict=False)), **entry.kwargs}
    source = given["input"]
    if given.get("training") or not isinstance(source, Ref) or log.tensors[source.slot].dim() != 2:
        raise NotLifted("batch norm between the experts' layers takes its statistics from the batch, or no rows")
    views: dict[str, View] = {}
    for name, role in _OPERANDS.items():
        if given.get(name) is None:
            continue
        view = view_of(log, given[name].slot, log.owned)
        if view is None or len(view.shape) != 1:
            raise NotLifted(f"the {name} of a batch norm is no tensor of the module's")
        views[f"{role}_{place}"] = view
    if f"mean_{place}" not in views or f"var_{place}" not in views:
        raise NotLifted("batch norm between the experts' layers takes its statistics from the batch")
    return Affine(place, float(given["eps"])), views, source.slot
