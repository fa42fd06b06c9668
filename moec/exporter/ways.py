"""Which ways there are to write a layer for a target, best first.

E experts, D model width, F expert width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from moec.backends.onnx.form import EXACT, INTEGER, Form
from moec.backends.onnx.own_moe import why_not
from moec.exporter.probes import num_experts
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
    rival: bool = False
    """Which of these is fastest depends on sizes and on the machine."""


def ways(exact: Region, settings: Settings) -> Iterator[Way]:
    """What there is for these settings, best first. `exact` is the region after the passes that keep results."""
    if settings.quantize is None:
        if settings.target == "cuda":
            yield _own(exact, Form(experts="moe"))
            yield Way(_each(exact), exact, EXACT)
        else:
            yield from _each_way(Way(_each(exact), exact, EXACT))
    elif settings.quantize == "int4":
        yield from _int4(exact, settings)
    else:
        yield from _int8(exact, settings)


def _each(region: Region) -> str:
    return "sorted rows, a product for each expert" if num_experts(region) > 1 else "a product for each matrix"


def _each_way(way: Way) -> Iterator[Way]:
    """Sorted rows with the experts' products side by side, and one behind the other where that can be: rivals."""
    if num_experts(way.region) == 1 or expert_op(way.region) is None:
        yield way
        return
    yield replace(way, rival=True)
    title = way.title.replace("a product for each expert", "a chain for each expert")
    yield replace(way, title=title, form=replace(way.form, chained=True), rival=True)


def _int8(exact: Region, settings: Settings) -> Iterator[Way]:
    quantized, _ = run(exact, default_passes(Options.make(quantize="int8")))
    each = _each(exact)
    by_rows = Way(f"{each}, int8 weights and rows", quantized, INTEGER)
    if settings.target == "cuda":
        yield from _qmoe(exact, settings, 8, (128, 64))
    elif settings.target == "cpu":
        title = f"{by_rows.title}, MatMulIntegerToFloat"
        yield from _each_way(Way(title, quantized, Form(products="integer_to_float")))
        yield from (replace(way, rival=not way.why_not) for way in _qmoe(exact, settings, 8, (128, 64, 32)))
    yield from [by_rows] if settings.target != "portable" else _each_way(by_rows)
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
    op = expert_op(region)
    if op is None:
        return Way(title, region, form, "the layer is not routed experts alone")
    return Way(title, region, form, why_not(op, form))


def expert_op(region: Region) -> ExpertFfn | None:
    """The one op of a region that is routed experts and nothing else."""
    ops = [node.op for node in region.nodes if not node.op.of_weights]
    return ops[0] if len(ops) == 1 and isinstance(ops[0], ExpertFfn) else None


def optimised(region: Region) -> Region:
    """The region after the passes that keep results within the bar."""
    return run(region, default_passes(Options.make()))[0]
