"""Weights that moec does not understand yet, refused by name before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

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
        if "forward" in child.__dict__:
            name = f"{owner}.{path}".strip(".") or "the model"
            raise NotLifted(f"{name} has its forward overridden already (by another tool)")


def is_lazy(model: nn.Module) -> bool:
    """Some parameter has no shape yet, so that not even candidates can be looked for."""
    return any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters())


def unreadable(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(module, why) for modules whose weights cannot even be looked at."""
    for name, module in model.named_modules():
        lazy = [
            n for n, p in module.named_parameters(recurse=False) if isinstance(p, nn.parameter.UninitializedParameter)
        ]
        if lazy:
            yield name, f"weight {lazy[0]!r} is lazy and not initialised yet; run the model once before compiling"
        elif _is_quantised(module):
            yield name, f"it is a quantised {type(module).__name__}, which is not understood yet"


def _is_quantised(module: nn.Module) -> bool:
    home = type(module).__module__
    return "quantized" in home and home.startswith("torch.")


def computed_owner(name: str) -> str:
    """The module whose attribute a parametrization stands for."""
    return name.split(".parametrizations", maxsplit=1)[0].removesuffix("parametrizations").rstrip(".")
