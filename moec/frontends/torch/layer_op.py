"""The experts of a compiled layer as one operator, `moec::layer`, for the graphs of torch.compile and torch.export.

T tokens, K experts per token, E experts, D inputs, O outputs. The operator has all it needs among its operands: the
weights as tensors, and the region, where its weights lie and how routing is given as text. So graphs never hold stale
weights, and a saved program runs in another process.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moec.backendbase import Executable, load_backend, why_not
from moec.errors import MoecError
from moec.frontends.torch.layer_backward import keep_operands, layer_gradients
from moec.frontends.torch.layer_spec import Spec, routing_of, spec_of
from moec.frontends.torch.lift import DTYPES
from moec.frontends.torch.operands import OperandStore
from moec.frontends.torch.routing import Unusual
from moec.ir import parse

_TORCH = {name: dtype for dtype, name in DTYPES.items()}


# Asks a layer of this process why it cannot serve its module now; registered by the key in graphs of torch.compile.
_ALIVE: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def watch(key: str, asked: Any) -> None:
    """Let graphs that hold `key` ask `asked.blocked_in_graph(tracing=False)` on each call, while it is there."""
    _ALIVE[key] = asked


def watched(key: str) -> Any:
    """What `watch` was given; None when it is gone."""
    return _ALIVE.get(key)


@torch.library.custom_op("moec::layer", mutates_args=())
def layer_op(
    x: torch.Tensor,
    selector: torch.Tensor | None,
    weights: torch.Tensor | None,
    params: Sequence[torch.Tensor],
    layer: str,
    key: str,
) -> torch.Tensor:
    """x[..., D], the routing in the layer's form, its parameters -> [T, O].

    `layer` is a Spec as text, `key` the layer that torch.compile traced, or empty in an exported program. Raises
    MOEC234 where the original would have to run, which a graph does not have: for other routing than was verified, and
    after changes of settings.
    """
    spec = spec_of(layer)
    asked = _ALIVE.get(key) if key else None
    why = asked.blocked_in_graph(tracing=False) if asked is not None else ""
    if why:
        hint = "call torch.compiler.reset(), so that the change is traced; moec.refresh(model) compiles the layer again"
        raise _cannot(spec, why, hint)
    rows = x.reshape(-1, spec.inputs)
    if not rows.shape[0]:
        return x.new_zeros(0, spec.width, dtype=_TORCH[spec.dtype])
    bound = _bound(layer, spec, params, x.device)
    bound.store.enter(params)
    try:
        (y,) = bound.executable(rows, *routing_of(spec, x, rows.shape[0], selector, weights))
    except Unusual as unusual:
        raise _cannot(spec, str(unusual), "run such calls outside of the graph, on the compiled model") from None
    finally:
        bound.store.leave()
    mine = y.untyped_storage()._cdata
    given = [t for t in (x, selector, weights, *params) if t is not None]
    return y.clone() if any(t.untyped_storage()._cdata == mine for t in given) else y


@layer_op.register_fake
def _(x: Any, selector: Any, weights: Any, params: Any, layer: str, key: str) -> torch.Tensor:
    spec = spec_of(layer)
    tokens = x.reshape(-1, spec.inputs).shape[0]
    found: torch.Tensor = x.new_empty(tokens, spec.width, dtype=_TORCH[spec.dtype])
    return found


layer_op.register_autograd(layer_gradients, setup_context=keep_operands)


def _cannot(spec: Spec, why: str, hint: str) -> MoecError:
    return MoecError("MOEC234", f"{spec.name} cannot run compiled inside of a graph: {why}", hint=hint)


@dataclass(frozen=True, eq=False)
class _Bound:
    """An executable over the operands of each call."""

    executable: Executable
    store: OperandStore


_BOUND: dict[tuple[str, int], _Bound] = {}
_LOCK = threading.RLock()


def _bound(layer: str, spec: Spec, params: Sequence[torch.Tensor], device: torch.device) -> _Bound:
    """The layer's executable for these operands; it goes when the first of them goes."""
    key = (layer, id(params[0]))
    found = _BOUND.get(key)
    if found is None:
        with _LOCK:
            found = _BOUND.get(key)
            if found is None:
                found = _BOUND[key] = _build(spec, params, device)
                weakref.finalize(params[0], _BOUND.pop, key, None)
    return found


def forget(params: Sequence[torch.Tensor]) -> None:
    """Drop the executables of these operands, and with them their copies of weights."""
    for key in [key for key in _BOUND if key[1] == id(params[0])]:
        _BOUND.pop(key, None)


def _build(spec: Spec, params: Sequence[torch.Tensor], device: torch.device) -> _Bound:
    why = why_not(spec.backend, device)
    if why:
        hint = f"the graph was made for back end {spec.backend}; trace it again where it is to run"
        raise _cannot(spec, why, hint)
    store = OperandStore(spec.table)
    store.enter(params)
    try:
        # CUDA graphs are the caller's business here: torch.compile makes its own.
        return _Bound(load_backend(spec.backend).build(parse(spec.region), store, {}, pack=spec.pack), store)
    finally:
        store.leave()
