"""A verified cut under torch.export: the same calls as at run time, without the checks that look at values or sizes.

T tokens, K experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from moec.frontends.torch.calls import Call, ChosenCall, DirectCall, PlacedCall, SlicedCall
from moec.frontends.torch.direct import spread_over
from moec.frontends.torch.expertchoice import CHOSEN
from moec.frontends.torch.oplog import Ref
from moec.frontends.torch.program import Live, Step
from moec.frontends.torch.sizes import Size
from moec.trees import tree_flatten, tree_map

Mark = Callable[..., torch.Tensor]
"""x[T, D], and experts[T, K], weights[T, K] for a mixture -> [T, O]."""


def why_unmarked(call: Call) -> str:
    """Why a cut cannot stand in a file; empty if it can."""
    if isinstance(call, ChosenCall) or (isinstance(call, SlicedCall) and call.form in CHOSEN):
        return "its experts choose their tokens, which is not exported yet"
    known = isinstance(call, DirectCall | PlacedCall | SlicedCall)
    return "" if known else f"cuts of the kind {type(call).__name__} are not exported"


def call_marked(call: Call, module: torch.nn.Module, mark: Mark, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the cut's method returns, its experts computed by `mark`."""
    if isinstance(call, DirectCall):
        return _direct(call, mark, args, kwargs)
    if isinstance(call, PlacedCall):
        x = call.binder(args, kwargs)[call.x_name]
        rows = call.places.rows(x, call.experts)
        y = mark(rows, *_routing("places", None, rows, rows.shape[0], call.experts, 1))
        return call.places.back(y, call.places.shape(x.shape, call.experts, y.shape[-1]))
    assert isinstance(call, SlicedCall), type(call)
    return _sliced(call, module, mark, args, kwargs)


def _direct(call: DirectCall, mark: Mark, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    bound = call.binder(args, kwargs)
    x = bound[call.roles.x]
    rows = x.reshape(-1, call.inputs)
    if call.roles.form is None:
        y = mark(rows)
    else:
        selector = None if call.roles.selector is None else bound[call.roles.selector]
        weights = rows if call.roles.weights is None else bound[call.roles.weights]
        if call.roles.spread:
            lead = x.shape[:-1]
            selector = None if selector is None else spread_over(selector, lead)
            weights = weights if call.roles.weights is None else spread_over(weights, lead)
        chosen, lent = _routing(call.roles.form, selector, weights, rows.shape[0], call.experts, call.roles.slots)
        y = mark(rows, chosen, lent if call.roles.scale == 1 else lent * call.roles.scale)
    return y.reshape([_size(size, x.shape) for size in call.out_shapes[x.dim()]])


def _routing(
    form: str, selector: torch.Tensor | None, weights: torch.Tensor, tokens: Any, experts: int, slots: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """experts[T, K] and weights[T, K]; an index E means no expert."""
    if form == "dense":
        gates = weights.reshape(tokens, experts)
        every = torch.arange(experts, device=gates.device)
        chosen = torch.where(gates != 0, every, experts).sort(-1).values[:, :slots]
        return chosen, gates.gather(-1, chosen.clamp(max=experts - 1)).masked_fill(chosen == experts, 0)
    if form == "places":
        each = torch.arange(experts, device=weights.device).unsqueeze(1).expand(experts, tokens // experts)
        return each.reshape(-1, 1), weights.new_ones(tokens, 1)
    assert selector is not None
    if form in ("mask", "unit mask"):
        chosen = selector.reshape(tokens, slots, experts) == 1
        first = torch.where(chosen.any(-1), chosen.to(torch.int64).argmax(-1), experts)
        return first, weights.reshape(tokens, slots) if form == "mask" else weights.new_ones(tokens, slots)
    assert form in ("indices", "unit"), form
    ids = selector.reshape(tokens, slots)
    if form == "unit":
        return ids, torch.ones_like(ids, dtype=weights.dtype)
    return ids, weights.reshape(tokens, slots)


def _sliced(
    call: SlicedCall, module: torch.nn.Module, mark: Mark, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    s = call.sliced
    bound = call.binder(args, kwargs)
    given = bound[s.x_name]
    env: dict[int, torch.Tensor] = {s.input_slot: given.contiguous()}
    env.update({more.slot: bound[more.name].contiguous() for more in s.more})
    dims: Sequence[Any] = given.shape
    _run(s.before, module, env, dims)
    selector, weights = (None if t is None else _fill(t, module, env, dims) for t in (s.selector, s.weights))
    x = _fill(s.x, module, env, dims)
    rows = x.reshape(-1, call.inputs) if call.places is None else call.places.rows(x, call.experts)
    if call.form is None:
        y = mark(rows)
    else:
        if call.spread and selector is not None:
            selector = spread_over(selector, x.shape[:-1])
        lent = rows if weights is None else weights
        chosen, lent = _routing(call.form, selector, lent, rows.shape[0], call.experts, call.num_slots)
        y = mark(rows, chosen, lent if call.scale == 1 else lent * call.scale)
    if call.places is None:
        y = y.reshape(_fill(s.y_shape, module, env, dims))
    else:
        y = call.places.back(y, call.places.shape(x.shape, call.experts, y.shape[-1]))
    env[s.y_slot] = y.to(s.y_dtype)
    _run(s.after, module, env, dims)
    env[s.input_slot] = given
    return _fill(s.result, module, env, dims)


def _run(steps: Sequence[Step], module: torch.nn.Module, env: dict[int, torch.Tensor], dims: Sequence[Any]) -> None:
    for step in steps:
        args, kwargs = _fill(step.arguments, module, env, dims)
        out = step.op(*args, **kwargs) if step.path is None else module.get_submodule(step.path)(*args, **kwargs)
        for slot, value in zip(step.outs, tree_flatten(out)[0], strict=True):
            if slot is not None:
                env[slot] = value


def _fill(tree: Any, module: torch.nn.Module, env: Mapping[int, torch.Tensor], dims: Sequence[Any]) -> Any:
    """The template with its leaves looked up; sizes stay symbols."""

    def leaf(one: Any) -> Any:
        if isinstance(one, Ref):
            return env[one.slot]
        if isinstance(one, Size):
            return _size(one, dims)
        return _live(module, one) if isinstance(one, Live) else one

    return tree_map(leaf, tree, is_leaf=lambda one: isinstance(one, Ref | Size | Live))


def _size(size: int | Size, dims: Sequence[Any]) -> Any:
    if isinstance(size, int):
        return size
    product: Any = 1
    for i in size.factors:
        product = product * dims[i]
    return product * size.scale.numerator // size.scale.denominator + size.shift


def _live(module: torch.nn.Module, live: Live) -> torch.Tensor:
    path, _, leaf = live.name.rpartition(".")
    found: torch.Tensor = getattr(module.get_submodule(path) if path else module, leaf)
    if tuple(found.shape) == live.shape and live.offset == 0 and live.stride == live.owner_stride:
        return found
    return found.as_strided(live.shape, live.stride, live.offset)
