"""Recording a run: the user's code runs as it is, and each thing it does is written to a log.

Capture by tracing fails on most MoE blocks (data-dependent loops, `.tolist()`), so each ATen call, each read of a value
on the host and each call of a submodule or method (a *site*) is recorded while the code runs eagerly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from moec.frontends.torch.bounds import check_indices, on_gpu
from moec.frontends.torch.contained import ABSENT, plain_attributes
from moec.frontends.torch.oplog import HOST_READ, Log, Site

# They read memory without an ATen call.
_HOST_READS = frozenset({"tolist", "numpy", "__array__", "data_ptr"})
# A class with more methods than this is a model's root (generate, save_pretrained, ...), not a layer.
_MOST_METHODS = 24


@functools.lru_cache(maxsize=4096)
def _written_arguments(op: Any) -> tuple[tuple[int, str], ...]:
    arguments = op._schema.arguments
    return tuple((i, a.name) for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write)


def _counted(op: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The tensors whose values decide how large the result is: Python sees them in its shape."""
    name = op.overloadpacket.__name__
    if name == "index":
        return tuple(i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8))
    return args[1:2] if name == "masked_select" else args[:1]


class _AtenRecorder(TorchDispatchMode):
    def __init__(self, log: Log) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.log = log

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written: list[torch.Tensor] = []
        for position, name in _written_arguments(func):
            value = args[position] if position < len(args) else kwargs.get(name)
            written.extend(
                v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, torch.Tensor)
            )
        for tensor in written:
            self.log.before_write(tensor)
        if on_gpu(args):
            check_indices(func, args)
        out = func(*args, **kwargs)
        self.log.append(func, args, kwargs, out, written)
        if self.log.asserting:
            return out
        if type(out) in (int, float, bool):
            self.log.append(HOST_READ, args, {}, None, ())
        elif torch.Tag.dynamic_output_shape in func.tags:
            self.log.append(HOST_READ, _counted(func, args), {}, None, ())
        return out


class _HostReadRecorder(TorchFunctionMode):
    """`.tolist()` and `.numpy()` read memory without an ATen call."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self.log = log

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _HOST_READS:
            self.log.append(HOST_READ, args[:1], {}, None, ())
        if name != "one_hot":
            return func(*args, **(kwargs or {}))
        # It looks at its values to check them against the number of classes, or to find that number: no branch then.
        classes = args[1] if len(args) > 1 else (kwargs or {}).get("num_classes", -1)
        self.log.asserting = classes != -1
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.log.asserting = False


class _Recorder:
    """Stands in for one method of one module instance while a run is recorded."""

    def __init__(
        self, state: _Recording, path: str, name: str, module: torch.nn.Module, call: Callable[..., Any]
    ) -> None:
        self.state, self.path, self.name, self.module, self.call = state, path, name, module, call
        # User code may inspect the signature of a method it is about to call.
        functools.update_wrapper(self, call)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        log = self.state.log
        site = Site(
            self.path, self.name, self.module, log.refs(args), log.refs(kwargs), len(log.entries), self.state.open
        )
        log.sites.append(site)
        self.state.open = site
        before = plain_attributes(self.module)
        try:
            result = self.call(*args, **kwargs)
        finally:
            self.state.open = site.parent
            site.end = len(log.entries)
        now = plain_attributes(self.module)
        if now != before:
            both = {name: (before.get(name, ABSENT), now.get(name, ABSENT)) for name in {**before, **now}}
            site.assigned = {name: values for name, values in both.items() if values[0] != values[1]}
        site.result = log.refs(result)
        return result


@dataclass
class _Recording:
    log: Log
    open: Site | None = None


def _methods(module: torch.nn.Module) -> Iterator[str]:
    """Names of the plain methods a user's class defines, `forward` first."""
    yield "forward"
    for cls in type(module).__mro__:
        if cls is torch.nn.Module:
            return
        if cls.__module__.startswith("torch.nn.modules") and cls.__name__ != "TransformerEncoderLayer":
            continue
        own = [n for n, f in vars(cls).items() if not n.startswith("__") and n != "forward" and callable(f)]
        if len(own) <= _MOST_METHODS:
            yield from (n for n in own if not isinstance(vars(cls)[n], (staticmethod, classmethod, type)))


def record(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, path: str = "", method: str = "forward"
) -> Log:
    """Run `module.<method>(*args, **kwargs)` without gradients and return what it did.

    Names of sites and parameters are prefixed with `path`. Instance attributes set for the recording are removed again,
    whatever happens.
    """
    log = Log()
    prefix = f"{path}." if path else ""
    for name, tensor in [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]:
        log.own(prefix + name, tensor)
    for name, child in module.named_modules(prefix=path):
        for attribute, value in child.__dict__.items():
            if type(value) is torch.Tensor:
                log.own(f"{name}.{attribute}".lstrip("."), value)
    state = _Recording(log)
    set_on: list[tuple[torch.nn.Module, str]] = []
    try:
        for name, child in module.named_modules(prefix=path):
            for attribute in _methods(child):
                call = getattr(child, attribute, None)
                if call is None or attribute in child.__dict__ or isinstance(child, torch.jit.ScriptModule):
                    continue
                child.__dict__[attribute] = _Recorder(state, name, attribute, child, call)
                set_on.append((child, attribute))
        with torch.no_grad(), _HostReadRecorder(log), _AtenRecorder(log):
            log.result = log.refs(getattr(module, method)(*args, **kwargs))
    finally:
        for child, attribute in set_on:
            child.__dict__.pop(attribute, None)
    return log
