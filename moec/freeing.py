"""free_original=True: experts' parameters move to where kernels reach them fastest; their old memory is given back."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from moec.compiler import Compiled, compile_layer
from moec.errors import MoecError
from moec.frontends.torch.lifted import Lifted
from moec.gathered import Gathered, gather_experts
from moec.options import Options
from moec.weights import View, WeightStore


def refuse_freeing(options: Options, backend: str) -> None:
    """Raise MOEC503 where free_original is asked for and packed copies cannot stand in for the parameters."""
    if options.free_original and backend != "triton":
        why = f"back end {backend} packs into layouts that no parameter can have, so parameters stay beside them"
        raise MoecError("MOEC503", f"free_original=True: {why}", hint="leave free_original out")


def compile_freed(probe: nn.Module, lifted: Lifted, options: Options, backend: str) -> Compiled:
    """One layer, its parameters brought together first where that was asked for: what runs is what is verified."""
    if not options.free_original:
        return compile_layer(lifted, options, backend)
    moved = gather_layer(probe, lifted.module, lifted.views)
    compiled = compile_layer(lifted, options, backend)
    layer = compiled.layer
    layer.evidence = (*layer.evidence, str(moved))
    layer.bytes_peak = max(layer.bytes_peak or 0, (layer.bytes_before or 0) + moved.extra)
    return compiled


def gather_layer(model: nn.Module, module: nn.Module, views: Mapping[str, View | tuple[View, ...]]) -> Gathered:
    """Bring the experts' parameters of one layer together, unless anything else of the model shares their memory."""
    return gather_experts(WeightStore(module, views), [*model.parameters(), *model.buffers()])
