"""The backward of `moec::layer`: the operator `moec::layer_backward` runs the region's meaning again with gradients.

T tokens, K experts per token, E experts, D inputs, O outputs. Nothing but the forward's operands is kept for it. A
layer has a backward where its gradients were compared with the original's while it was compiled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from moec.backendbase import Differentiable, load_backend
from moec.errors import MoecError
from moec.frontends.torch.layer_spec import region_of, routing_of, spec_of
from moec.frontends.torch.operands import LeafStore


@torch.library.custom_op("moec::layer_backward", mutates_args=())
def layer_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    selector: torch.Tensor | None,
    weights: torch.Tensor | None,
    params: Sequence[torch.Tensor],
    needed: Sequence[bool],
    layer: str,
) -> list[torch.Tensor]:
    """grad[T, O] and the operands of `moec::layer` -> the gradients of those of (x, weights, *params) that `needed`
    says, in this order, each of its operand's shape."""
    spec = spec_of(layer)
    if not grad.shape[0]:
        return [torch.zeros_like(t) for t in _asked(x, weights, params, needed)]
    store = LeafStore(spec.table, params, needed[2:])
    with _recording():
        own_x = x.detach().requires_grad_(needed[0])
        own_weights = None if weights is None else weights.detach().requires_grad_(needed[1])
        rows = own_x.reshape(-1, spec.inputs)
        routing = routing_of(spec, own_x, rows.shape[0], selector, own_weights)
        meaning = load_backend("reference")
        assert isinstance(meaning, Differentiable)
        (y,) = meaning.differentiable(region_of(layer), store, (rows, *routing))
    leaves = [t for t in (own_x, own_weights) if t is not None and t.requires_grad]
    found: Iterator[Any] = iter(store.gradients(y, leaves, grad))
    given = [next(found) for _ in leaves]
    # A leaf that the result does not depend on has zeros; and none of the results may be an operand.
    first = [torch.zeros_like(t) if g is None else _own(g, grad, t) for t, g in zip(leaves, given, strict=True)]
    return [*first, *found]


@layer_backward.register_fake
def _(grad: Any, x: Any, selector: Any, weights: Any, params: Any, needed: Any, layer: str) -> list[torch.Tensor]:
    return [torch.empty_like(t) for t in _asked(x, weights, params, needed)]


@contextmanager
def _recording() -> Iterator[None]:
    """With autograd at work, which torch has left behind when it runs what is behind an operator."""
    autograd = torch._C.DispatchKey.AutogradFunctionality
    with torch._C._SetExcludeDispatchKeyGuard(autograd, False), torch.enable_grad():
        yield


def _asked(x: Any, weights: Any, params: Sequence[Any], needed: Sequence[bool]) -> list[Any]:
    return [t for t, need in zip((x, weights, *params), needed, strict=True) if need]


def _own(found: torch.Tensor, grad: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The gradient in memory of its own, laid out as the operator's fake says."""
    apart = found.untyped_storage()._cdata != grad.untyped_storage()._cdata
    result = torch.empty_like(like)
    return found if apart and found.stride() == result.stride() else result.copy_(found)


def keep_operands(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    """What the backward needs of a call of `moec::layer`; autograd notices writes to it in between."""
    x, selector, weights, params, ctx.layer, _ = inputs
    ctx.save_for_backward(x, selector, weights, *params)


def layer_gradients(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    """Gradients for the operands of `moec::layer`. Raises MOEC235 where the layer has none in graphs."""
    spec = spec_of(ctx.layer)
    if spec.no_gradients:
        raise MoecError(
            "MOEC235",
            f"{spec.name} has no backward inside of a graph: {spec.no_gradients}",
            hint="moec.compile(..., training=True) looks for gradients in graphs; outside of them there always are",
        )
    x, selector, weights, *params = ctx.saved_tensors
    of_x, _, of_weights, of_params, *_ = ctx.needs_input_grad
    # The weights are x's own dtype's ones where there are none.
    needed = [of_x, bool(of_weights) and weights is not None, *of_params]
    found = iter(layer_backward(grad, x, selector, weights, params, needed, ctx.layer) if any(needed) else ())
    first, second, *rest = [next(found) if need else None for need in needed]
    return first, None, second, rest, None, None


def _no_second(ctx: Any, *grads: Any) -> Any:
    raise MoecError(
        "MOEC235",
        f"{spec_of(ctx.layer).name} has no gradients of gradients inside of a graph",
        hint="call the compiled model outside of torch.compile and torch.export for those",
    )


def _keep_name(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.layer = inputs[-1]


layer_backward.register_autograd(_no_second, setup_context=_keep_name)
