"""Weights that moec does not understand yet, refused by name before anything runs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.utils import parametrize

from moec.frontends.torch.instances import NotLifted

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_weights(model: nn.Module, owner: str, names: Iterable[str]) -> None:
    """Raises NotLifted for meta, quantised, lazy, parametrized or subclassed weights, and for devices that differ."""
    params = dict(model.named_parameters(remove_duplicate=False))
    devices = set()
    for name in sorted(names):
        param = params[name]
        kind = type(param.data) if type(param) is nn.Parameter else type(param)
        if isinstance(param, nn.parameter.UninitializedParameter):
            raise NotLifted(f"weight {name!r} is lazy and not initialised yet; run the model once before compiling")
        if kind.__name__ == "DTensor":
            raise NotLifted(f"weight {name!r} is a DTensor; distributed weights are not understood yet")
        if kind not in (torch.Tensor, nn.Parameter):
            raise NotLifted(f"weight {name!r} is a {kind.__name__}, a tensor subclass that is not understood yet")
        if param.is_meta:
            raise NotLifted(f"weight {name!r} is on the meta device; load the weights before compiling")
        if param.is_quantized or param.dtype not in _FLOATS:
            dtype = str(param.dtype).removeprefix("torch.")
            raise NotLifted(f"weight {name!r} is {dtype}, already quantised weights are not understood yet")
        devices.add(str(param.device))
        if ".parametrizations." in f".{name}":
            raise NotLifted(f"weight {name!r} is parametrized; remove the parametrization before compiling")
    if len(devices) > 1:
        raise NotLifted(f"its weights are on several devices: {', '.join(sorted(devices))}")
    module = model.get_submodule(owner)
    for path, child in module.named_modules():
        if parametrize.is_parametrized(child):
            raise NotLifted(
                f"{owner}.{path}".strip(".") + " is parametrized; remove the parametrization before compiling"
            )
        if "quantized" in type(child).__module__ and type(child).__module__.startswith(
            ("torch.ao", "torch.nn.quantized")
        ):
            raise NotLifted(
                f"{owner}.{path}".strip(".") + f" is a quantised {type(child).__name__}, which is not understood yet"
            )
        if path and "forward" in child.__dict__:
            raise NotLifted(f"{owner}.{path}".strip(".") + " has its forward overridden already (by another tool)")


def computed_owner(name: str) -> str:
    """The module whose attribute a parametrization stands for."""
    return name.split(".parametrizations", maxsplit=1)[0].removesuffix("parametrizations").rstrip(".")
