"""What is written for a layer, once the graph around it is known. T tokens, K experts per token, E experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from moec.backendbase import Weights
from moec.backends.onnx.emitter import Emitter
from moec.backends.onnx.form import EXACT, Form
from moec.backends.onnx.providers import providers_of, why_no_cuda
from moec.errors import MoecError
from moec.exporter.check import Check, check_region
from moec.exporter.facts import Facts
from moec.exporter.probes import num_experts
from moec.exporter.result import ExportedLayer
from moec.exporter.routers import SoftmaxRouter
from moec.ir import Builder, ExpertFfn, Region, Route, Tensor, Value

_KINDS = {"FLOAT": "f32", "FLOAT16": "f16", "BFLOAT16": "bf16"}


@dataclass(frozen=True)
class Placed:
    """What stands in a mark's place: a region over weights, and the form it is written in."""

    name: str
    region: Region
    weights: Weights
    form: Form = EXACT
    title: str = ""
    """The form in words."""
    told: ExportedLayer | None = None
    """Where the report says how the layer is written."""
    check: Check | None = None
    """How the region, written so, compared with the layer."""
    instead: Placed | None = None
    """What to write where the graph does not prove that the router's weights are not negative."""
    logits: Any = None
    """Of the router that the node has inside; the region then reads x and these."""

    def settled(self, facts: Facts, router: SoftmaxRouter | None = None) -> Placed:
        """This, one that has the router inside, or what stands instead, entered in the report.

        Raises MOEC704 where the graph allows none.
        """
        layer = self.told or ExportedLayer(self.name, "moe", "left alone")
        one = self._with_router(router, layer) if router is not None and self._for_cuda else None
        if one is None:
            one = self
            if self.form.experts != "sorted" and not facts.nonnegative:
                one = self._instead(layer)
        layer.status, layer.lowering = "rewritten", one.title
        if one.check is not None:
            layer.max_error, layer.max_abs_error = one.check.max_error, one.check.max_abs_error
            layer.bar = one.check.bar
        return one

    def inputs(self, emit: Emitter, given: list[Any]) -> list[Any]:
        """What the region reads, of x[T, D], experts[T, K] and weights[T, K]."""
        if self.logits is None:
            return given
        flat = self.logits.shape is not None and len(self.logits.shape) == 2
        return [given[0], self.logits if flat else emit.reshape(self.logits, -1, num_experts(self.region))]

    @property
    def _for_cuda(self) -> bool:
        return self.form.experts == "moe" or self.form.cuda

    def _instead(self, layer: ExportedLayer) -> Placed:
        layer.tried.append(f"{self.title}: the graph does not prove that the router's weights are not negative")
        if self.instead is None:
            where = "; ".join(layer.tried)
            raise MoecError("MOEC704", f"no way to write {self.name} passed its check", where=where)
        return self.instead

    def _with_router(self, router: SoftmaxRouter, layer: ExportedLayer) -> Placed | None:
        """The node with its own router, which is kept to where it was seen to choose as the model does."""
        title = f"{self.title}, with its own router"
        kind = "f16" if self.form.half else self.region.inputs[0].type.dtype
        found = None if router.logits.dtype is None else _KINDS.get(router.logits.dtype.name)
        if found != kind:
            layer.tried.append(f"{title}: it takes logits in {kind}, and the model's are {found or 'of unknown type'}")
            return None
        if why_no_cuda():
            layer.tried.append(f"{title}: its choice among equals can only be checked on the CUDA provider")
            return None
        region, form = with_router(self.region, router.normalize, kind), replace(self.form, router=True)
        bar = self.check.bar if self.check is not None else 2e-6
        check = check_region(region, region, self.weights, form, bar, providers_of("cuda"))
        if not check.passed:
            layer.tried.append(f"{title}: {check.why}")
            return None
        return replace(self, region=region, form=form, title=title, check=check, logits=router.logits, instead=None)


def with_router(region: Region, normalize: bool, kind: str) -> Region:
    """A region of routed experts alone, with a softmax router in front of it: over x and logits[T, E] of this type."""
    (expert,) = [node.op for node in region.nodes if isinstance(node.op, ExpertFfn)]
    (k,) = [expert.experts.type.shape[1].constant]
    assert k is not None
    build = Builder(region.name)
    x = build.input(region.inputs[0].name, region.inputs[0].type)
    logits = build.input("logits", Tensor.of(kind, x.type.shape[0], num_experts(region)))
    route = Route(logits, k=k, score="softmax", normalize="sum" if normalize else "none")
    weights, experts = build.add_many(route, ["weights", "experts"])
    now = dict(zip((value.name for value in region.inputs), (x, experts, weights), strict=True))
    for node in region.nodes:
        op = node.op.map_operands(partial(_renamed, now))
        results = build.add_many(op, [value.name for value in node.results])
        now |= {old.name: new for old, new in zip(node.results, results, strict=True)}
    return build.build(*(now[value.name] for value in region.outputs))


def _renamed(now: Mapping[str, Value], value: Value) -> Value:
    return now[value.name]
