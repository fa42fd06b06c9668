"""A region of one fused op that records gradients: forward and backward by kernels.

T tokens, K experts per token, D model width, O output width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moec.backends.reference.frame import Frame
from moec.backends.reference.joined import Experts
from moec.backends.reference.table import MEANINGS
from moec.backends.reference.weights import LiveWeight, per_expert
from moec.backends.triton.choose import GEMV
from moec.backends.triton.executable import TritonExecutable
from moec.backends.triton.fused import ROLES
from moec.backends.triton.gradient_store import GradientStore
from moec.backends.triton.gradient_tiles import FALLBACK
from moec.backends.triton.gradients import Saved, TrainRun, Wanted
from moec.backends.triton.hit import HitExperts
from moec.backends.triton.operands import Operands
from moec.backends.triton.prepare import Prepared, dense
from moec.backends.triton.site import Site
from moec.backends.triton.spec import Layer, layer_of
from moec.ir import ExpertFfn, Region, Weight
from moec.weights import WeightStore

KEPT_RUNS = 256
"""Numbers of tokens whose launches are kept; all are dropped when there are more."""
_PARTS = (("w_in", "w_up"), ("w_out",), ("b_in", "b_up"), ("b_out",))
"""Operands whose gradients are computed together, in the order of `Wanted`'s fields."""


class RecordingExecutable(TritonExecutable):
    """Like its base where no gradients are recorded. Where they are, results are part of the autograd graph.

    Of gradients of gradients it knows the op's meaning in torch. What the backward needs of x, ids, routing weights and
    parameters is saved by autograd, which notices when they were written to in between.
    """

    def __init__(self, region: Region, weights: WeightStore, *, absent: bool = False, **more: Any) -> None:
        """`absent`: parameters of experts without tokens get no gradient instead of zeros."""
        super().__init__(region, weights, {}, pack=False, **more)
        self._alone = _of_one_expert(weights) if absent else {}
        self._views, self.params = weights, tuple(weights.params)
        self._sources = _sources(region, weights)
        self._gradients = GradientStore(weights)
        self._runs: dict[Any, TrainRun] = {}
        self.why = self._why_not()

    def _why_not(self) -> str:
        """Why gradients are not computed by kernels; empty if they are."""
        if self._express is None:
            return "the region is more than one fused op"
        if self._once:
            return "its weights are computed from the parameters"
        found = self.fused[0].describe()
        return found if found.startswith("by its meaning") else self._gradients.why_not()

    def _run(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        if not torch.is_grad_enabled():
            return super()._run(inputs)
        self._inputs.check(inputs)
        fused = self.fused[0]
        operands = (
            (fused.op.x, fused.op.experts, fused.op.weights) if isinstance(fused.op, ExpertFfn) else (fused.op.x,)
        )
        x, *routing = (inputs[self._inputs.names.index(value.name)] for value in operands)
        ids, weights = routing if routing else (None, None)
        with torch.no_grad():
            values = self._weights()
        at = Frame(values, {}, {})
        prepared = fused.prepared_at(at, x.device)
        params = [self._views.param(name) for name in self.params]
        if prepared is None or x.shape[0] == 0 or (ids is not None and ids.shape[1] == 0):
            return (self._meaning(x, ids, weights, params),)
        return (Recorded.apply(self, prepared, x, ids, weights, *params),)  # type: ignore[no-untyped-call]

    def run_for(self, prepared: Prepared, ids: torch.Tensor, weights: torch.Tensor | None) -> TrainRun:
        """The launches for routing like this."""
        kind = (ids.dtype, None if weights is None else weights.dtype, prepared.precision())
        key = (prepared, ids.shape, *kind)
        run = self._runs.get(key)
        if run is not None:
            return run
        tokens, k = ids.shape
        plan = prepared.plan(tokens, k)
        plan = FALLBACK if plan.path == GEMV else plan
        made = prepared.launches("recording", *kind)
        site = Site(prepared.layer, prepared.facts, k, weights is not None, False, kind[2], made)
        if len(self._runs) >= KEPT_RUNS or any(known[0] is not prepared for known in self._runs):
            self._runs.clear()
        run = self._runs[key] = TrainRun(site, plan, tokens)
        return run

    def wanted(self, needed: tuple[bool, ...]) -> Wanted:
        """What a backward computes, from which of x, ids, weights and the parameters need a gradient."""
        asked = {name for name, need in zip(self.params, needed[3:], strict=True) if need}
        parts = [not asked.isdisjoint(self._params_of(*roles)) for roles in _PARTS]
        return Wanted(needed[0], needed[2], *parts)

    def memory_for(
        self, roles: Sequence[str], prepared: Prepared, params: Sequence[torch.Tensor]
    ) -> tuple[Layer, dict[str, torch.Tensor]]:
        """Memory for the gradients of these operands: as kernels write it, and by name of the parameters."""
        found = self._gradients.make(self._params_of(*roles), prepared.device)
        # What is not wanted is not written: the parameters themselves stand there.
        store = self._views.standing_in({**dict(zip(self.params, params, strict=True)), **found})
        values, op = self._values(store), self.fused[0].op
        operands = {role: values[v.name] for role in ROLES for v in [getattr(op, role)] if v is not None}
        return layer_of(op, Operands(**operands), prepared.device), found

    def _params_of(self, *roles: str) -> frozenset[str]:
        """Names of the parameters that these operands of the op are made of."""
        values = [getattr(self.fused[0].op, role) for role in roles]
        return frozenset().union(*(self._sources[v.name] for v in values if v is not None))

    def _values(self, store: WeightStore) -> dict[str, Experts]:
        """The weights of the region as another store has them."""
        experts = per_expert(self._region)
        values: dict[str, Experts] = {}
        for node in self._region.nodes:
            if isinstance(node.op, Weight):
                name = node.results[0].name
                values[name] = LiveWeight(store, node.op, of_experts=name in experts).read()
        at = Frame(values, {}, {})
        for step in self._weight_steps:
            step.run(at)
        return at.values

    def _meaning(
        self,
        x: torch.Tensor,
        ids: torch.Tensor | None,
        weights: torch.Tensor | None,
        params: list[torch.Tensor],
    ) -> torch.Tensor:
        """The op in torch's own operations, with these parameters: part of the graph, whatever its order."""
        store = self._views.standing_in(dict(zip(self.params, params, strict=True)))
        op = self.fused[0].op
        values = self._values(store)
        values[op.x.name] = x
        if isinstance(op, ExpertFfn):
            assert ids is not None
            assert weights is not None
            values |= {op.experts.name: ids, op.weights.name: weights}
        (y,) = MEANINGS[type(op)](op, Frame(values, {}, {}))
        assert isinstance(y, torch.Tensor)
        return y

    def hit(self, meta: torch.Tensor, prepared: Prepared) -> HitExperts | None:
        """Which experts have tokens, on its way to the host; None where nobody asks."""
        capturing = meta.is_cuda and torch.cuda.is_current_stream_capturing()
        return None if not self._alone or capturing else HitExperts(meta, prepared.layer.experts)

    def absent(self, hit: HitExperts | None) -> frozenset[str]:
        """Names of the parameters that get no gradient."""
        if hit is None:
            return frozenset()
        empty = hit.empty()
        return frozenset(name for name, e in self._alone.items() if e in empty)

    def higher(
        self,
        tensors: tuple[torch.Tensor | None, ...],
        needed: tuple[bool, ...],
        dy: torch.Tensor,
    ) -> list[torch.Tensor | None]:
        """Gradients that have gradients, of x, ids, weights and the parameters."""
        # Views, or tensors that are made of each other would give gradients by way of each other.
        own = [t.view_as(t) if t is not None and need else t for t, need in zip(tensors, needed, strict=True)]
        x, ids, weights, *params = own
        assert x is not None
        y = self._meaning(x, ids, weights, [p for p in params if p is not None])
        asked = [t for t, need in zip(own, needed, strict=True) if need and t is not None]
        found = iter(torch.autograd.grad(y, asked, dy, create_graph=True, allow_unused=True))
        return [next(found) if need else None for need in needed]


@dataclass(frozen=True, slots=True)
class _Call:
    """One forward: who runs it, and with which kernels, which hold on to the memory they read."""

    by: RecordingExecutable
    prepared: Prepared
    run: TrainRun
    hit: HitExperts | None
    """Asked only where parameters of experts without tokens get no gradient."""


class _Memory:
    """Memory for the gradients of weights, made when it is asked for."""

    def __init__(self, call: _Call, wanted: Wanted, params: Sequence[torch.Tensor]) -> None:
        self._call, self._params = call, params
        self._asked = (wanted.w_in, wanted.w_out, wanted.b_in, wanted.b_out)
        self.by_name: dict[str, torch.Tensor] = {}

    def __call__(self, first: bool) -> Layer:
        """Where kernels write gradients: of the first product's weights, or of the second's."""
        roles = [role for i in ((0, 2) if first else (1, 3)) if self._asked[i] for role in _PARTS[i]]
        layer, found = self._call.by.memory_for(roles, self._call.prepared, self._params)
        self.by_name.update(found)
        return layer


class Recorded(torch.autograd.Function):
    """x[T, D], ids[T, K], weights[T, K], parameters -> y[T, O]."""

    @staticmethod
    def forward(
        ctx: Any,
        by: RecordingExecutable,
        prepared: Prepared,
        x: torch.Tensor,
        ids: torch.Tensor | None,
        weights: torch.Tensor | None,
        *params: torch.Tensor,
    ) -> torch.Tensor:
        given = _as_kernels_take_them(prepared, x, ids, weights)
        run = by.run_for(prepared, given[1], given[2])
        y, saved = run.forward(*given)
        ctx.call = _Call(by, prepared, run, by.hit(saved.meta, prepared))
        ctx.overwritten = False
        ctx.save_for_backward(x, ids, weights, saved.z, saved.meta, *params)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        call: _Call = ctx.call
        x, ids, weights, z, meta, *params = ctx.saved_tensors
        needed = tuple(ctx.needs_input_grad[2:])
        # Gradients are being recorded in a backward under create_graph=True.
        if torch.is_grad_enabled():
            return None, None, *call.by.higher((x, ids, weights, *params), needed, dy)
        wanted, saved = call.by.wanted(needed), Saved(z, meta)
        memory = _Memory(call, wanted, params)
        given = _as_kernels_take_them(call.prepared, x, ids, weights)
        if ctx.overwritten:  # by an earlier backward through a graph that was retained
            call.run.restore(given[0], saved)
        ctx.overwritten = wanted.hidden
        dx, dw = call.run.backward(dense(dy), *given, saved, memory, wanted)
        absent = call.by.absent(call.hit)
        asked = [need and name not in absent for name, need in zip(call.by.params, needed[3:], strict=True)]
        found = [memory.by_name[name] if ask else None for name, ask in zip(call.by.params, asked, strict=True)]
        return None, None, dx, None, None if dw is None or weights is None else dw.view(weights.shape), *found


def _as_kernels_take_them(
    prepared: Prepared, x: torch.Tensor, ids: torch.Tensor | None, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    ids = prepared.first_expert(x.shape[0]) if ids is None else ids.contiguous()
    return dense(x), ids, None if weights is None else weights.contiguous()


def _of_one_expert(store: WeightStore) -> dict[str, int]:
    """Parameters that belong to one expert alone, with its number."""
    found: dict[str, set[int]] = {}
    for entry in store.views.values():
        for e, view in enumerate(entry if isinstance(entry, tuple) else ()):
            found.setdefault(view.param, set()).add(e)
    return {name: experts.pop() for name, experts in found.items() if len(experts) == 1}


def _sources(region: Region, store: WeightStore) -> Mapping[str, frozenset[str]]:
    """For each value that depends on weights only, the names of the parameters it is made of."""
    found: dict[str, frozenset[str]] = {}
    for node in region.nodes:
        operands = [value.name for value in node.op.operands]
        if isinstance(node.op, Weight):
            entry = store.views[node.op.ref]
            views = entry if isinstance(entry, tuple) else (entry,)
            found[node.results[0].name] = frozenset(view.param for view in views)
        elif node.op.of_weights and all(name in found for name in operands):
            union = frozenset().union(*(found[name] for name in operands))
            found.update((value.name, union) for value in node.results)
    return found
