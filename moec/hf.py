"""moec as an experts implementation of transformers: `model.set_experts_implementation("moec")`.

Each experts module is analysed, and verified against the code of its modeling file, when it first runs. What cannot be
expressed is refused by name.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from moec.compiler import Compiled, choose_backend, compile_layer
from moec.errors import MoecError
from moec.frontends.torch.analyse import analyse
from moec.frontends.torch.effects import Watch
from moec.frontends.torch.method import CompiledMethod
from moec.frontends.torch.twin import make_probe
from moec.options import Options
from moec.undisturbed import undisturbed

NAME = "moec"
_KEPT = "_moec_experts"


class ExpertsMethod(CompiledMethod):
    """An experts module's compiled forward, called in place of transformers' own implementations."""

    @property
    def original(self) -> Any:
        """The forward of the modeling file, which the decorator of transformers has wrapped."""
        return _eager(type(self.module)).__get__(self.module)


def register_hf(**options: Any) -> None:
    """Make `model.set_experts_implementation("moec")` known to transformers. Options are the fields of moec.Options.

    May be called again, with other options; modules that ran already keep theirs. Raises MOEC501-503 for options,
    MOEC236 without transformers 5. A module that cannot be expressed raises MOEC236 when it first runs.
    """
    chosen = Options.make(**options)
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise MoecError(
            "MOEC236",
            f"transformers has no experts implementations: {error}",
            hint="pip install 'moec[hf]', which needs transformers 5",
        ) from error

    def moec_experts(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        method = module.__dict__.get(_KEPT)
        if not isinstance(method, ExpertsMethod) or method.module is not module:
            method = _compiled(module, chosen, args, kwargs)
        return method(*args, **kwargs)

    ALL_EXPERTS_FUNCTIONS.register(NAME, moec_experts)


def reports(model: nn.Module) -> dict[str, Any]:
    """The LayerReport of each experts module that has run as "moec", by the module's path."""
    found = {name: module.__dict__.get(_KEPT) for name, module in model.named_modules()}
    return {name: method.layer for name, method in found.items() if isinstance(method, ExpertsMethod)}


@torch.compiler.disable(reason="moec compiles an experts module when it first runs: run the model once before")  # type: ignore[untyped-decorator]
def _compiled(module: nn.Module, options: Options, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExpertsMethod:
    with undisturbed():
        known = module.__dict__.get(_KEPT)
        if isinstance(known, ExpertsMethod) and known.module is module:
            return known
        made = _compile(module, options, args, kwargs)
        method = made.method_for(module, ExpertsMethod)
        assert isinstance(method, ExpertsMethod)
        method.ready()
        module.__dict__[_KEPT] = method
        return method


def _compile(module: nn.Module, options: Options, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Compiled:
    name = type(module).__name__
    if getattr(module, "_is_expert_parallel", False):
        raise _refused(name, "its experts lie on several devices")
    probe = make_probe(module)
    config = getattr(probe, "config", None)
    if config is None or getattr(config, "_experts_implementation", None) is None:
        raise _refused(name, "it has no config that names an implementation")
    config._experts_implementation_internal = "eager"  # of the probe's own copy
    example = tuple(t.detach().clone() if isinstance(t, torch.Tensor) else t for t in args)
    named = {k: t.detach().clone() if isinstance(t, torch.Tensor) else t for k, t in kwargs.items()}
    watch = Watch(probe)
    try:
        found = analyse(probe, (example, named), lambda _: None)
        lifted = next((one for one in found.lifted if one.name == "" and one.kind == "moe"), None)
        if lifted is None:
            raise _refused(name, "; ".join(one.reason for one in found.refused) or "no mixture was found in it")
        device = next(module.parameters()).device
        made = compile_layer(lifted, options, choose_backend(options, device)[0])
    finally:
        watch.undo()
    if not made.layer.compiled:
        raise _refused(name, made.layer.reason)
    made.layer.name = name
    return made


def _refused(name: str, why: str) -> MoecError:
    hint = 'model.set_experts_implementation("eager") runs it; moec.explain(model, example_inputs) says more'
    return MoecError("MOEC236", f'{name} cannot run as experts implementation "{NAME}": {why}', hint=hint)


def _eager(cls: type[nn.Module]) -> Any:
    return inspect.unwrap(cls.forward)
