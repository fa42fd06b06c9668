"""What a run changes besides its result: random state, buffers, parameters, attributes, and objects outside the module
that its code refers to. Seen, named, and undone."""

from __future__ import annotations

import io
import random
import sys
import threading
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch

from moec.frontends.torch.contained import ABSENT, PLAIN
from moec.frontends.torch.reads import Reads, classes_of, reads_of
from moec.frontends.torch.snapshot import Snapshot, same, version

_MACHINERY = frozenset(
    {"_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "forward", "training"}
)
_BUFFER_LIMIT = 1 << 24
_LIBRARIES = frozenset({"torch", "moec", "numpy", *sys.stdlib_module_names}) - {"__main__"}


class _Ear(io.TextIOBase):
    """Stands for standard output: hears what this thread prints, and lets other threads through."""

    def __init__(self, out: Any) -> None:
        self.out, self.thread, self.heard = out, threading.get_ident(), False

    def write(self, text: str) -> int:
        if threading.get_ident() != self.thread:
            return self.out.write(text)  # type: ignore[no-any-return]
        self.heard = True
        return len(text)

    def flush(self) -> None:
        self.out.flush()


class Watch:
    """Remembers a module's state; `changes()` names what differs now, `undo()` puts it back.

    With `hear`, what is printed until then is an effect too, and is not shown.
    """

    def __init__(self, module: torch.nn.Module, inputs: Iterable[torch.Tensor] = (), *, hear: bool = False) -> None:
        self.module = module
        self.ear: _Ear | None = None
        self.rng = torch.get_rng_state()
        self.python_rng = random.getstate()
        devices = {p.device for p in module.parameters() if p.is_cuda}
        self.gpu_rng = [(device, torch.cuda.get_rng_state(device)) for device in devices]
        self.inputs = [(tensor, tensor._version) for tensor in inputs if not tensor.is_inference()]
        self.params = [(name, p, version(p)) for name, p in module.named_parameters()]
        self.state: list[tuple[str, torch.nn.Module, dict[str, Any], dict[str, Any]]] = []
        self.values: list[tuple[str, torch.Tensor, int, torch.Tensor | None]] = []
        self.held, self.outside = Snapshot(), Snapshot()
        for name, child in module.named_modules():
            attributes = {k: v for k, v in child.__dict__.items() if k not in _MACHINERY}
            self.state.append((name, child, attributes, dict(child._buffers)))
            prefix = f"{name}." if name else ""
            for key, value in attributes.items():
                self.held.add("sets attribute", prefix + key, value)
            for key, buffer in child._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    copy = buffer.detach().clone() if buffer.numel() <= _BUFFER_LIMIT else None
                    self.values.append((f"{name}.{key}".lstrip("."), buffer, version(buffer), copy))
        self._look_outside(module)
        if hear:
            self.listen()

    def listen(self) -> None:
        """Hear what is printed from now on until `undo`."""
        self.ear = sys.stdout = _Ear(sys.stdout)

    def _look_outside(self, module: torch.nn.Module) -> None:
        """Class attributes, globals and variables of enclosing functions that the modules' code refers to."""
        modules = list(module.modules())
        reads = reads_of(type(module).forward, modules, modules)
        for cls in classes_of(modules):
            self._add_class(cls)
        for table, names in reads.globals(assigned=True):
            home = str(table.get("__name__", ""))
            if home.partition(".")[0] not in _LIBRARIES:
                self.outside.bind("changes global", f"{home}.", table, names)
                for name in names & table.keys():
                    self._add_global(table[name], reads)
        for name, cell in reads.cells():
            self.outside.add("changes the enclosing function's variable", name, cell)
            self.outside.add("changes the enclosing function's variable", name, cell.cell_contents)
        for function in reads.functions.values():
            for value in (function.__defaults__ or (), function.__kwdefaults__ or {}):
                self.outside.add("changes a default argument of", function.__qualname__, value)
        numpy = sys.modules.get("numpy.random")
        if numpy is not None:
            self.outside.add("draws random numbers from", "numpy.random", numpy.mtrand._rand)

    def _add_class(self, cls: type) -> None:
        if cls.__module__.partition(".")[0] not in _LIBRARIES:
            names = [n for n, v in vars(cls).items() if not n.startswith("__") and not callable(v)]
            self.outside.bind("changes class attribute", f"{cls.__name__}.", cls, names)

    def _add_global(self, value: Any, reads: Reads) -> None:
        """A class keeps its state in attributes, a Python module in names that the code mentions."""
        if isinstance(value, type):
            self._add_class(value)
        elif isinstance(value, ModuleType) and value.__name__.partition(".")[0] not in _LIBRARIES:
            self.outside.bind("changes global", f"{value.__name__}.", vars(value), reads.names & vars(value).keys())

    def changes(self) -> list[str]:
        """One phrase per effect, empty when the run was pure."""
        found = []
        gpu = any(not torch.equal(state, torch.cuda.get_rng_state(device)) for device, state in self.gpu_rng)
        if gpu or not torch.equal(self.rng, torch.get_rng_state()) or self.python_rng != random.getstate():
            found.append("draws random numbers")
        found += ["prints to standard output"] * (self.ear is not None and self.ear.heard)
        found += ["changes its input in place" for tensor, count in self.inputs if tensor._version != count][:1]
        found += [f"changes parameter {name!r}" for name, p, count in self.params if version(p) != count]
        found += [f"changes buffer {name!r}" for name, buffer, count, _ in self.values if version(buffer) != count]
        for name, child, before, buffers in self.state:
            prefix = f"{name}." if name else ""
            found += [f"replaces buffer {prefix + k!r}" for k, v in child._buffers.items() if buffers.get(k) is not v]
            now = {k: v for k, v in child.__dict__.items() if k not in _MACHINERY}
            found += [f"sets attribute {prefix + k!r}" for k in now if k not in before or not same(now[k], before[k])]
        return list(dict.fromkeys([*found, *self.held.changes(), *self.outside.changes()]))

    def assigned(self) -> dict[str, tuple[Any, Any]]:
        """Plain attributes of submodules that differ now: name -> (before, now)."""
        return {
            f"{name}.{key}": (before.get(key, ABSENT), value)
            for name, child, before, _ in self.state
            for key, value in child.__dict__.items()
            if name
            and key not in _MACHINERY
            and type(value) in PLAIN
            and type(before.get(key)) in PLAIN
            and before.get(key, ABSENT) != value
        }

    def undo(self) -> None:
        """Restore random state, buffers, attributes, and what lies outside."""
        if self.ear is not None and sys.stdout is self.ear:
            sys.stdout = self.ear.out
        torch.set_rng_state(self.rng)
        random.setstate(self.python_rng)
        for device, state in self.gpu_rng:
            torch.cuda.set_rng_state(state, device)
        for _, buffer, count, copy in self.values:
            if copy is not None and version(buffer) != count:
                buffer.detach().copy_(copy)
        for _, child, before, buffers in self.state:
            child._buffers.update(buffers)
            for key in [k for k in child.__dict__ if k not in _MACHINERY and k not in before]:
                del child.__dict__[key]
            child.__dict__.update(before)
        self.held.undo()
        self.outside.undo()
