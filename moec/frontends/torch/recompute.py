"""Gradients of a compiled layer: forward by the compiled code, backward through the original, run again.

The second run must be of the same function: it gets the parameters and buffers that the forward had, whatever stands in
the module by then, runs in eval mode and without hooks, and is refused when something was written to in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from moec.errors import MoecError
from moec.frontends.torch.guard import HOOKS
from moec.frontends.torch.snapshot import version
from moec.trees import tree_flatten, tree_unflatten


class Structure:
    """The shape of a result whose tensors went through autograd."""

    spec: Any = None
    fixed: list[Any]
    is_tensor: list[bool]

    def split(self, result: Any, given: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        """The tensors of a result. One that is an argument itself is handed back as it is."""
        leaves, self.spec = tree_flatten(result)
        own = {id(leaf) for leaf in given if isinstance(leaf, torch.Tensor)}
        self.is_tensor = [isinstance(leaf, torch.Tensor) and id(leaf) not in own for leaf in leaves]
        self.fixed = [None if t else leaf for t, leaf in zip(self.is_tensor, leaves, strict=True)]
        return tuple(leaf for t, leaf in zip(self.is_tensor, leaves, strict=True) if t)

    def restore(self, tensors: Any) -> Any:
        """The result with these tensors."""
        tensors = iter(tensors if isinstance(tensors, tuple) else (tensors,))
        return tree_unflatten(
            [next(tensors) if t else f for t, f in zip(self.is_tensor, self.fixed, strict=True)], self.spec
        )


@dataclass(frozen=True)
class Slot:
    """A parameter or buffer in its place, with its count of writes."""

    name: str
    table: dict[str, Any]
    key: str
    tensor: torch.Tensor
    count: int


def slots_of(module: torch.nn.Module) -> list[Slot]:
    """All parameters and buffers, as they are now."""
    return [
        Slot(f"{path}.{key}".lstrip("."), table, key, tensor, version(tensor))
        for path, child in module.named_modules()
        for table in (child._parameters, child._buffers)
        for key, tensor in table.items()
        if tensor is not None
    ]


@dataclass(frozen=True)
class Layer:
    """What the forward and the backward of one call have in common."""

    module: torch.nn.Module
    compiled: Callable[[tuple[Any, ...], dict[str, Any]], Any]
    original: Callable[..., Any]
    changed: Callable[[], str]
    slots: Sequence[Slot]

    @property
    def params(self) -> list[torch.Tensor]:
        """What gradients are asked for besides the arguments, each once."""
        return list({id(s.tensor): s.tensor for s in self.slots if s.tensor.requires_grad}.values())

    def again(self, args: tuple[Any, ...], kwargs: dict[str, Any], params: Sequence[torch.Tensor]) -> Any:
        """The original's result, computed as it would have been in the forward, with these in place of `params`."""
        for slot in self.slots:
            if version(slot.tensor) != slot.count:
                raise _changed(f"{slot.name!r} was written to in place")
        changed = self.changed()
        if changed:
            raise _changed(changed)
        given = dict(zip(map(id, self.params), params, strict=True))
        device = next((slot.tensor.device.type for slot in self.slots), "cpu")
        with (
            torch.enable_grad(),
            _as_in_forward(self.module),
            in_place([(slot, given.get(id(slot.tensor), slot.tensor)) for slot in self.slots]),
            torch.autocast(device, enabled=False),
        ):
            return self.original(*args, **kwargs)


def _changed(what: str) -> MoecError:
    return MoecError(
        "MOEC233",
        f"between the forward and the backward of a compiled layer, which runs its original code again there, {what}",
        hint="call backward before changing the layer, or moec.restore(model) to compute gradients",
    )


@dataclass(frozen=True)
class Asked:
    """The arguments of one call: the tensors among them are handed in, the rest is kept."""

    layer: Layer
    leaves: Sequence[Any]
    spec: Any
    places: Sequence[int]

    @property
    def count(self) -> int:
        return len(self.places)

    def filled(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments with these tensors."""
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self.spec)
        return args, kwargs

    def gradients(
        self, tensors: Sequence[torch.Tensor], grads: Sequence[Any], *, create_graph: bool
    ) -> Sequence[torch.Tensor | None]:
        """The original's gradient for each tensor, inputs first and then parameters."""
        # On stand-ins, or tensors that are made of each other would give gradients by way of each other. Those with a
        # graph of their own are views, so that the gradients have derivatives of any order.
        own = [_stand_in(t, create_graph) if t.requires_grad else t for t in tensors]
        args, kwargs = self.filled(own[: self.count])
        outs = Structure().split(self.layer.again(args, kwargs, own[self.count :]), own[: self.count])
        pairs = [(o, g) for o, g in zip(outs, grads, strict=True) if o.requires_grad and g is not None]
        wanted = [t for t in own if t.requires_grad]
        found: Iterator[torch.Tensor | None] = iter([None] * len(wanted))
        if pairs and wanted:
            ends, seeds = [o for o, _ in pairs], [g for _, g in pairs]
            found = iter(torch.autograd.grad(ends, wanted, seeds, allow_unused=True, create_graph=create_graph))
        return [next(found) if t.requires_grad else None for t in own]


def _stand_in(tensor: torch.Tensor, create_graph: bool) -> torch.Tensor:
    return tensor.view_as(tensor) if create_graph else tensor.detach().requires_grad_()


def run_with_gradients(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The compiled layer's result, part of the autograd graph."""
    leaves, spec = tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    shape, tensors = Structure(), [leaves[i] for i in places]
    asked = Asked(layer, [None if i in places else v for i, v in enumerate(leaves)], spec, places)
    outs = Recompute.apply(asked, shape, *tensors, *layer.params)  # type: ignore[no-untyped-call]
    return shape.restore(outs)


class Recompute(torch.autograd.Function):
    """Forward by the compiled layer, backward through the original code on the same inputs."""

    @staticmethod
    def forward(ctx: Any, asked: Asked, shape: Structure, *tensors: torch.Tensor) -> Any:
        given = tensors[: asked.count]
        outs = shape.split(asked.layer.compiled(*asked.filled(given)), given)
        ctx.asked = asked
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*[t for t in outs if not t.is_floating_point()])
        return outs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        # Gradients are being recorded in a backward under create_graph=True.
        return None, None, *ctx.asked.gradients(ctx.saved_tensors, grads, create_graph=torch.is_grad_enabled())


@contextmanager
def _as_in_forward(module: torch.nn.Module) -> Iterator[None]:
    """In eval mode and without hooks, as in the forward, whatever was switched or registered since."""
    training = [m for m in module.modules() if m.training]
    hooks = [(t, t.copy()) for m in module.modules() if m is not module for n in HOOKS for t in [getattr(m, n)] if t]
    try:
        for m in training:
            m.training = False
        for table, _ in hooks:
            table.clear()
        yield
    finally:
        for m in training:
            m.training = True
        for table, kept in hooks:
            table.update(kept)


@contextmanager
def in_place(tensors: Sequence[tuple[Slot, torch.Tensor]]) -> Iterator[None]:
    """These tensors in their places: functional_call has taken its own away by the time of the backward."""
    others = [(slot, tensor, slot.table.get(slot.key)) for slot, tensor in tensors]
    others = [(slot, tensor, now) for slot, tensor, now in others if now is not tensor]
    try:
        for slot, tensor, _ in others:
            slot.table[slot.key] = tensor
        yield
    finally:
        for slot, _, now in others:
            slot.table[slot.key] = now
