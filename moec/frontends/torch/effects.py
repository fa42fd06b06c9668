"""What a run changes besides its result: random state, buffers, parameters, attributes. Seen, named, and undone."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import torch

_MACHINERY = frozenset(
    {"_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "forward", "training"}
)
_BUFFER_LIMIT = 1 << 24


def _version(tensor: torch.Tensor) -> int:
    """Rises with each write in place; tensors made under inference_mode keep no count."""
    lazy = isinstance(tensor, torch.nn.parameter.UninitializedParameter | torch.nn.parameter.UninitializedBuffer)
    return 0 if lazy or tensor.is_inference() else tensor._version


class Watch:
    """Remembers a module's state; `changes()` names what differs now, `undo()` puts it back."""

    def __init__(self, module: torch.nn.Module, inputs: Iterable[torch.Tensor] = ()) -> None:
        self.module = module
        self.rng = torch.get_rng_state()
        self.python_rng = random.getstate()
        self.inputs = [(tensor, tensor._version) for tensor in inputs if not tensor.is_inference()]
        self.params = [(name, p, _version(p)) for name, p in module.named_parameters()]
        self.state: list[tuple[str, torch.nn.Module, dict[str, Any], dict[str, Any], dict[str, Any]]] = []
        self.values: list[tuple[str, torch.Tensor, int, torch.Tensor | None]] = []
        for name, child in module.named_modules():
            attributes = {k: v for k, v in child.__dict__.items() if k not in _MACHINERY}
            self.state.append(
                (name, child, attributes, {k: _copied(v) for k, v in attributes.items()}, dict(child._buffers))
            )
            for key, buffer in child._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    copy = buffer.detach().clone() if buffer.numel() <= _BUFFER_LIMIT else None
                    self.values.append((f"{name}.{key}".lstrip("."), buffer, _version(buffer), copy))

    def changes(self) -> list[str]:
        """One phrase per effect, empty when the run was pure."""
        found = []
        if not torch.equal(self.rng, torch.get_rng_state()) or self.python_rng != random.getstate():
            found.append("draws random numbers")
        found += ["changes its input in place" for tensor, version in self.inputs if tensor._version != version][:1]
        found += [f"changes parameter {name!r}" for name, p, version in self.params if _version(p) != version]
        found += [f"changes buffer {name!r}" for name, buffer, version, _ in self.values if _version(buffer) != version]
        for name, child, before, copies, buffers in self.state:
            prefix = f"{name}." if name else ""
            found += [f"replaces buffer {prefix + k!r}" for k, v in child._buffers.items() if buffers.get(k) is not v]
            now = {k: v for k, v in child.__dict__.items() if k not in _MACHINERY}
            found += [
                f"sets attribute {prefix + k!r}"
                for k in now
                if k not in before or not _equal(now[k], before[k], copies[k])
            ]
        return found

    def undo(self) -> None:
        """Restore random state, buffers and attributes."""
        torch.set_rng_state(self.rng)
        random.setstate(self.python_rng)
        for _, buffer, version, copy in self.values:
            if copy is not None and _version(buffer) != version:
                buffer.detach().copy_(copy)
        for _, child, before, copies, buffers in self.state:
            child._buffers.update(buffers)
            for key in [k for k in child.__dict__ if k not in _MACHINERY and k not in before]:
                del child.__dict__[key]
            for key, value in before.items():
                if isinstance(value, (list, dict, set)) and not _equal(value, value, copies[key]):
                    _refill(value, copies[key])
                child.__dict__[key] = value


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, (list, dict, set)) else value


def _equal(now: Any, before: Any, copy: Any) -> bool:
    if now is not before:
        simple = (int, float, str, bool, bytes, torch.dtype, torch.device, type(None), torch.Size, tuple)
        return isinstance(now, simple) and type(now) is type(before) and bool(now == before)
    if isinstance(now, (list, dict, set)):
        return len(now) == len(copy) and all(a is b for a, b in zip(_items(now), _items(copy), strict=True))
    return True


def _items(value: Any) -> list[Any]:
    return [*value.keys(), *value.values()] if isinstance(value, dict) else list(value)


def _refill(value: Any, copy: Any) -> None:
    value.clear()
    if isinstance(value, list):
        value.extend(copy)
    else:
        value.update(copy)
