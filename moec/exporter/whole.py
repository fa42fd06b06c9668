"""The whole file against the model, at sizes that were not traced: results, and the experts that its routers choose.

T tokens, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from moec.backendbase import load_backend
from moec.backends.onnx.bound import run_in_order
from moec.backends.onnx.providers import CPU, providers_of
from moec.backends.onnx.runtime import session
from moec.errors import MoecError
from moec.exporter.calls import Mark
from moec.exporter.check import LEAST_AGREEMENT, MODEL_BAR, ROUNDED_MODEL_BAR, Check, Met, agreement, run_probes
from moec.exporter.insert import Inserted
from moec.exporter.prepare import widened
from moec.exporter.probes import model_probes
from moec.exporter.result import ExportReport
from moec.exporter.rounding import LEAST_LOW_AGREEMENT, judge_rounding
from moec.exporter.settings import Settings
from moec.exporter.traced import Layout, layer_key, marked, results
from moec.exporter.ways import optimised
from moec.frontends.onnx.graphs import forget_unused
from moec.frontends.onnx.widen import in_fp32
from moec.frontends.torch.lifted import Lifted
from moec.weights import WeightStore

Tensors = Sequence[torch.Tensor]
Flat = Callable[[Tensors], Tensors]


@dataclass
class Written:
    """A model that was written, and what is needed to check and to time it."""

    model: Any
    original: Flat
    names: tuple[str, ...]
    tensors: list[torch.Tensor]
    shapes: Mapping[str, Sequence[int | str]]
    wide: Flat | None = None
    """The model in fp32, on inputs in its own types, where it computes in 16 bits."""

    def runs_on(self, providers: Sequence[Any]) -> bool:
        """Whether these compute all that is in the file: the CPU's does nothing in bf16."""
        if self.wide is None or providers != (CPU,):
            return True
        return not any(
            value.dtype is not None and value.dtype.name == "BFLOAT16"
            for node in self.model.graph
            for value in node.outputs
        )

    def probes(self, settings: Settings) -> list[tuple[str, list[torch.Tensor]]]:
        """Inputs at sizes that were not traced, and the given ones where all sizes are fixed."""
        found = list(model_probes(self.names, self.tensors, self.shapes))
        return [("the given shape", self.tensors), *found] if settings.static else found


def flat_call(twin: nn.Module, layout: Layout) -> Flat:
    """The model on tensors in a row."""

    def call(tensors: Tensors) -> Tensors:
        args, kwargs = layout.arguments(tensors)
        with torch.no_grad():
            return [tensor for _, tensor in results(twin(*args, **kwargs))]

    return call


def flat_wide(wide: nn.Module | None, layout: Layout) -> Flat | None:
    """The model in fp32 on what the model itself takes."""
    if wide is None:
        return None
    call = flat_call(wide, layout)
    return lambda tensors: call([widened(tensor) for tensor in tensors])


def check_whole(
    twin: nn.Module,
    layers: Sequence[Lifted],
    layout: Layout,
    inserted: Sequence[Inserted],
    written: Written,
    settings: Settings,
    report: ExportReport,
) -> None:
    """Enter in the report how far the file is from the model. Raises MOEC704 where it is another function."""
    probes = written.probes(settings)
    routed = {one.key: one.inputs[1] for one in inserted if len(one.inputs) == 3}
    order = list(dict.fromkeys(routed.values()))
    run, choices = _runs(written, order, settings, report)
    met, why = run_probes(written.original, run, probes)
    mixtures = [lifted for lifted in layers if layer_key(lifted) in routed] if choices else []
    by_key = {key: order.index(value) for key, value in routed.items()}
    agreed = _agreements(twin, mixtures, layout, dict(probes), met, by_key) if mixtures else [(0, 0)] * len(met)
    total = sum(count for _, count in agreed)
    report.routing_agreement = sum(same for same, _ in agreed) / total if total else None
    quantized = settings.quantize is not None
    if written.wide is None:
        check, least = _judge(met, why, quantized=quantized), LEAST_AGREEMENT
    else:
        same = [hits == count for hits, count in agreed]
        check = judge_rounding(met, written.wide, dict(probes), same, why, report, quantized=quantized)
        least = LEAST_LOW_AGREEMENT
    _enter(check, quantized, least, report)


def _runs(
    written: Written, chosen: Sequence[Any], settings: Settings, report: ExportReport
) -> tuple[Callable[[Tensors], list[torch.Tensor]], bool]:
    """The file as something to call, and whether it gives, behind its results, the experts that were chosen."""
    providers = providers_of(settings.target)
    if written.runs_on(providers):
        return partial(run_in_order, _with_choices(written.model, chosen, providers)), True
    report.checked_as = (
        "a copy of the file in fp32, neither loaded nor timed as it is: ONNX Runtime's CPU provider does not compute "
        "in bf16"
    )
    forget_unused(written.model)
    runtime = session(in_fp32(written.model))
    dtypes = [torch.bfloat16 if one.dtype.name == "BFLOAT16" else None for one in written.model.graph.outputs]

    def run(tensors: Tensors) -> list[torch.Tensor]:
        found = run_in_order(runtime, [widened(tensor) for tensor in tensors])
        return [one if dtype is None else one.to(dtype) for one, dtype in zip(found, dtypes, strict=True)]

    return run, False


def _with_choices(model: Any, chosen: Sequence[Any], providers: Sequence[Any]) -> Any:
    """A session that also gives the experts that were chosen."""
    outputs = model.graph.outputs
    count = len(outputs)
    outputs.extend(value for value in chosen if value not in outputs)
    try:
        forget_unused(model)
        return session(model, providers=providers)
    except Exception as error:  # ONNX Runtime's errors have no common class
        reason = str(error).strip().splitlines()[0][:200]
        raise MoecError(
            "MOEC704", f"ONNX Runtime does not load the file: {reason}", hint="nothing was written"
        ) from error
    finally:
        del outputs[count:]


def _judge(met: Sequence[Met], why: str, *, quantized: bool) -> Check:
    check = Check(bar=ROUNDED_MODEL_BAR if quantized else MODEL_BAR, loose=10.0, why=why)
    for one in met:
        check.labels.append(one.label)
        for mine, theirs in zip(one.mine, one.theirs, strict=True):
            check.add(one.label, mine, theirs)
    return check


def _enter(check: Check, quantized: bool, least: float, report: ExportReport) -> None:
    report.whole_model_error, report.whole_model_shapes = check.max_error, check.labels
    agreed = report.routing_agreement
    if agreed is not None and agreed < least and not quantized:
        raise MoecError("MOEC704", f"the routers of the file make {agreed:.1%} of the model's choices")
    near_ties = agreed is not None and agreed < 1
    if check.why and not (near_ties and "error" in check.why):
        raise MoecError("MOEC704", f"the whole model differs: {check.why}", hint="nothing was written")
    if check.why:
        report.notes.append(f"{check.why}, where routers met near ties")


def _agreements(
    twin: nn.Module,
    layers: Sequence[Lifted],
    layout: Layout,
    inputs: Mapping[str, list[torch.Tensor]],
    met: Sequence[Met],
    by_key: Mapping[str, int],
) -> list[tuple[int, int]]:
    """For each probe how many choices both make alike, and how many there are, over all layers."""
    found = []
    for one in met:
        chosen: dict[str, torch.Tensor] = {}
        with marked(twin, layers, _listener(chosen)), torch.no_grad():
            args, kwargs = layout.arguments(inputs[one.label])
            twin(*args, **kwargs)
        pairs = [(one.more[by_key[key]], ids) for key, ids in chosen.items()]
        found.append(agreement([a for a, _ in pairs], [b for _, b in pairs]))
    return found


def _listener(chosen: dict[str, torch.Tensor]) -> Callable[[Lifted], Mark]:
    """Marks that run the region by its meaning, and keep the experts that were chosen."""

    def mark_of(lifted: Lifted) -> Mark:
        run = load_backend("reference").build(optimised(lifted.region), WeightStore(lifted.module, lifted.views), {})

        def mark(x: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
            chosen[layer_key(lifted)] = routing[0].clone()
            return run(x, *routing)[0]

        return mark

    return mark_of
