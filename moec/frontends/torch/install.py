"""Putting compiled methods into live modules, finding them there, and taking them out again."""

from __future__ import annotations

from types import MethodType

import torch

from moec.frontends.torch.method import CompiledMethod


def install(compiled: CompiledMethod) -> None:
    """Override the method on the instance: one dict assignment, so an interrupt leaves no half-compiled module."""
    compiled.restored = False
    compiled.module.__dict__[compiled.method] = compiled


def installed(model: torch.nn.Module) -> list[CompiledMethod]:
    """All compiled methods inside a model."""
    found = [item for m in model.modules() for item in list(m.__dict__.items())]
    # What is kept under another name, as an experts implementation is, overrides nothing.
    return [v for name, v in found if isinstance(v, CompiledMethod) and name == v.method]


def drop_own_methods(model: torch.nn.Module) -> None:
    """Take out of each instance's `__dict__` the methods it has from its class anyway.

    Unpickling a compiled model leaves them there, in place of the compiled ones, where they would pass for overrides.
    """
    for module in model.modules():
        for name, value in list(module.__dict__.items()):
            own = isinstance(value, MethodType) and value.__self__ is module
            if own and value.__func__ is getattr(type(module), name, None):
                del module.__dict__[name]


def uninstall(compiled: CompiledMethod) -> None:
    """Give the instance its class's method back."""
    compiled.restored = True
    if compiled.module.__dict__.get(compiled.method) is compiled:
        del compiled.module.__dict__[compiled.method]
