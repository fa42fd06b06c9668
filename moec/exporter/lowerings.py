"""Which ways there are to write a layer for a target, best first, and the first of them that passes its check.

T tokens, K experts per token, E experts, D model width, F expert width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from moec.backendbase import Weights
from moec.backends.onnx.form import EXACT, INTEGER, Form
from moec.backends.onnx.own_moe import why_not
from moec.backends.onnx.providers import providers_of
from moec.exporter.check import check_region
from moec.exporter.insert import Placed
from moec.exporter.probes import num_experts
from moec.exporter.result import ExportedLayer
from moec.exporter.settings import Settings
from moec.ir import ExpertFfn, Region
from moec.options import Options
from moec.pipeline import default_passes, run


@dataclass(frozen=True)
class Way:
    """One way to write a layer."""

    title: str
    region: Region
    form: Form
    why_not: str = ""
    """Why it cannot be tried."""


def ways(exact: Region, settings: Settings) -> Iterator[Way]:
    """What there is for these settings, best first. `exact` is the region after the passes that keep results."""
    if settings.quantize is None:
        if settings.target == "cuda":
            yield _own(exact, Form(experts="moe"))
        yield Way(_each(exact), exact, EXACT)
    elif settings.quantize == "int4":
        yield from _int4(exact, settings)
    else:
        yield from _int8(exact, settings)


def _each(region: Region) -> str:
    return "sorted rows, a product for each expert" if num_experts(region) > 1 else "a product for each matrix"


def _int8(exact: Region, settings: Settings) -> Iterator[Way]:
    quantized, _ = run(exact, default_passes(Options.make(quantize="int8")))
    each = _each(exact)
    by_rows = Way(f"{each}, int8 weights and rows", quantized, INTEGER)
    if settings.target == "cuda":
        yield from _qmoe(exact, settings, 8, (128, 64))
    elif settings.target == "cpu":
        yield Way(f"{by_rows.title}, MatMulIntegerToFloat", quantized, Form(products="integer_to_float"))
    yield by_rows
    yield Way(f"{each}, int8 weights widened before it", quantized, EXACT)


def _int4(exact: Region, settings: Settings) -> Iterator[Way]:
    yield from _qmoe(exact, settings, 4, (32, 64, 128) if settings.target == "cpu" else (64, 128, 32))
    yield from _int8(exact, settings)


def _qmoe(region: Region, settings: Settings, bits: int, blocks: Sequence[int]) -> Iterator[Way]:
    """In the first of these blocks that fits. On CUDA it computes in 16 bits alone, and takes weights for packed."""
    if num_experts(region) == 1:
        return
    cuda = settings.target == "cuda"
    half = cuda and region.inputs[0].type.dtype not in ("f16", "bf16")
    tried = [_own(region, Form(experts="qmoe", bits=bits, block=block, half=half, cuda=cuda)) for block in blocks]
    yield next((way for way in tried if not way.why_not), tried[-1])


def _own(region: Region, form: Form) -> Way:
    """ONNX Runtime's own op, if it can say this layer."""
    kind = {"f16": "fp16", "bf16": "bf16"}.get("f16" if form.half else region.inputs[0].type.dtype, "fp32")
    title = f"MoE, {kind}" if form.experts == "moe" else f"QMoE, int{form.bits} in blocks of {form.block}, {kind}"
    ops = [node.op for node in region.nodes if not node.op.of_weights]
    if len(ops) != 1 or not isinstance(ops[0], ExpertFfn):
        return Way(title, region, form, "the layer is not routed experts alone")
    return Way(title, region, form, why_not(ops[0], form))


def optimised(region: Region) -> Region:
    """The region after the passes that keep results within the bar."""
    return run(region, default_passes(Options.make()))[0]


def place(region: Region, weights: Weights, settings: Settings, layer: ExportedLayer, bar: float) -> Placed | None:
    """The first way that passes its check, and what to write instead where it rests on more; None where none passes."""
    exact = optimised(region)
    best: Placed | None = None
    for way in ways(exact, settings):
        own = way.form.experts != "sorted"
        if own and best is not None:
            continue
        if way.why_not:
            layer.tried.append(f"{way.title}: {way.why_not}")
            continue
        check = check_region(exact, way.region, weights, way.form, bar, providers_of(settings.target))
        if not check.passed:
            layer.tried.append(f"{way.title}: {check.why}")
            continue
        one = Placed(layer.name, way.region, weights, way.form, way.title, layer, check)
        if not own:
            return one if best is None else replace(best, instead=one)
        best = one
    if best is None:
        layer.status, layer.reason = "left alone", "no way to write it passed its check"
    return best
