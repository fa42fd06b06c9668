"""What stands in a live model for a compiled layer: an override of one method on one module instance, with guards.

The override serves eval mode, and training mode where the layer is one function in both and the user asked for it. In
another mode, under autocast, when the input's dtype or rank is not the verified one,
or when a submodule that it replaces has got hooks, the original method runs instead; that is counted, warned of once
with a code, and an error under strict. Gradients are the original's: backward runs the original again, or the back end
computes them where they were verified to be the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch

from moec.errors import MoecError
from moec.frontends.torch.callers import copied_caller, recorded_by
from moec.frontends.torch.calls import Call, Executable
from moec.frontends.torch.fallback import note_fallback
from moec.frontends.torch.graphed import Graphed, new_key, wants_gradients, why_not_now
from moec.frontends.torch.guard import HOOKS, IN_TRAINING, Guards
from moec.frontends.torch.layer_op import watch
from moec.frontends.torch.recompute import Layer, run_with_gradients, slots_of
from moec.frontends.torch.routing import NoTokens, Unusual
from moec.frontends.torch.taken import Row, take
from moec.report import LayerReport
from moec.trees import tree_flatten
from moec.weights import WeightStore

# Hooks on every module of the process (profilers register them); torch keeps one flag-like test for all kinds.
_GLOBAL_HOOKS: Callable[[], bool] = torch.nn.modules.module._has_any_global_hook
_AUTOCAST: Callable[[], bool] = torch._C._is_any_autocast_enabled

Build = Callable[[WeightStore], Executable]
Recording = Callable[[WeightStore], Executable]
"""Builds what computes gradients itself: its results are part of the autograd graph."""


class CompiledMethod:
    """Stands in the instance's `__dict__` under the method's name."""

    is_moecs = True

    def __init__(
        self,
        module: torch.nn.Module,
        method: str,
        call: Call,
        store: Callable[[torch.nn.Module], WeightStore],
        build: Build,
        layer: LayerReport,
        replaced: tuple[str, ...],
        strict: bool,
        training: bool = False,
        graphed: Graphed | None = None,
        recording: Recording | None = None,
    ) -> None:
        self.module, self.method, self.call, self.store, self.build = module, method, call, store, build
        self.layer, self.replaced, self.strict, self.training = layer, replaced, strict, training
        self.graphed, self.key = graphed, new_key()
        watch(self.key, self)
        self.weights: WeightStore | None = None
        self.executable: Executable | None = None
        self.recording = recording
        self._recorder: Executable | None = None
        self._copied_from: tuple[str, Mapping[str, Hashable] | None] | None = None
        self._stale = ""
        self.restored = False
        # What the replaced code was when it was compiled, and the same as questions to this module.
        self._taken: tuple[Row, ...] | None = None
        self._guards: Guards | None = None

    @property
    def original(self) -> Callable[..., Any]:
        """The method as its class defines it."""
        return getattr(type(self.module), self.method).__get__(self.module)  # type: ignore[no-any-return]

    @property
    def __code__(self) -> Any:
        # torch.export looks for the line that a module's forward begins at.
        return inspect.unwrap(self.original).__code__

    @property
    def __signature__(self) -> inspect.Signature:
        # User code may inspect the signature of a method it is about to call.
        return inspect.signature(self.original)

    def ready(self) -> Executable:
        """The executable, built on first use after a copy. Raises MOEC230 where the copy was changed before that."""
        if self.executable is None:
            weights, guards = self._looked_at()
            executable = self.build(weights)
            # From now on: whether an expert has hooks is a question for calls, not for building.
            _watch(weights, guards)
            self.weights, self._guards, self.executable = weights, guards, executable
        return self.executable

    def _looked_at(self) -> tuple[WeightStore, Guards]:
        """The module's weights and guards, as they are now."""
        weights = self.store(self.module)
        if self._copied_from is not None:
            looks, layouts = self._copied_from
            if repr(self.module) != looks or (layouts is not None and weights.layouts != layouts):
                raise MoecError(
                    "MOEC230", "the module was changed after it was copied", hint="call moec.refresh(model)"
                )
        guards = self._guard(weights)
        return weights, guards

    def _guard(self, weights: WeightStore) -> Guards:
        try:
            if self._taken is None:
                self._taken = take(self.module, self.method, self.replaced)
            return Guards(self.module, self._taken, self.replaced, weights.views, training=self.training)
        except AttributeError as error:
            raise MoecError("MOEC230", f"a submodule is gone: {error}", hint="call moec.refresh(model)") from error

    def moved(self) -> str:
        """Why it cannot serve the module as it is now; empty if it can."""
        try:
            self.ready()
            assert self.weights is not None
            assert self._guards is not None
            changed = self._guards.changed()
            self.weights.check()
        except MoecError as error:
            return error.message
        return self._stale or changed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.restored:  # somebody kept it, a wrapper around forward for example
            return self.original(*args, **kwargs)
        if torch.compiler.is_compiling():
            return self._compiling(args, kwargs)
        copied = copied_caller(self.module, self.method, self)
        if copied is not None:
            own = getattr(type(copied), self.method).__get__(copied)
            return self._fall_back("it was called on a shallow copy of the compiled module", args, kwargs, own)
        try:
            executable = self.executable or self.ready()
            reason = self._blocked()
            if reason is not None:
                return self._fall_back(reason, args, kwargs)
            if torch.is_grad_enabled():
                needed = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor) and t.requires_grad]
                if needed or any(p.requires_grad for p in self.module.parameters()):
                    if self.recording is not None:
                        return self.call(self.module, self._record(self.recording), args, kwargs)
                    if self._hooked():
                        return self._fall_back("it has hooks, which the backward would call again", args, kwargs)
                    return self._with_gradients(args, kwargs)
                with torch.no_grad():
                    return self.call(self.module, executable, args, kwargs)
            return self.call(self.module, executable, args, kwargs)
        except NoTokens:
            return self.original(*args, **kwargs)
        except Unusual as unusual:
            return self._fall_back(str(unusual), args, kwargs)
        except MoecError as error:
            # Weights that are gone, or of another dtype since `.to()`: the original knows what to make of them.
            if error.code not in ("MOEC109", "MOEC230", "MOEC404", "MOEC405"):
                raise
            return self._fall_back(error.message, args, kwargs)

    def _compiling(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer in a graph; where it cannot be, the original under torch.export, else a break of the graph."""
        graphed, exporting = self.graphed, torch.compiler.is_exporting()
        if exporting and not torch.compiler.is_dynamo_compiling() and torch.onnx.is_in_onnx_export():
            return self._fall_back("torch.onnx.export is recording, and moec.export writes such files", args, kwargs)
        why = why_not_now(self.key) if graphed is not None else "its weights lie in unlike ways"
        if graphed is not None and not why:
            why = graphed.unfit(args, kwargs)
        if graphed is not None and not why and not (self.module.training and not self.training):
            if exporting:
                return graphed.run(self.module, "", args, kwargs)
            if not graphed.no_gradients or not wants_gradients(self.module, args, kwargs):
                return graphed.run(self.module, self.key, args, kwargs)
        if not exporting:
            return _eagerly(self, args, kwargs)
        if not torch.compiler.is_dynamo_compiling():  # which can trace neither warnings nor counts
            return self._fall_back(why or IN_TRAINING, args, kwargs)
        return self.original(*args, **kwargs)

    def blocked_in_graph(self, *, tracing: bool) -> str:
        """Why a graph cannot use the compiled layer now; empty if it can. For all experts: a graph chooses any.

        While a graph is traced parameters have no memory to ask for, nor to build on.
        """
        if self.restored:
            return "it was restored"
        try:
            if tracing:
                weights, guards = (self.weights, self._guards) if self.executable else _watch(*self._looked_at())
                assert weights is not None
                weights.ask()
                weights.check()
            else:
                self.ready()
                weights, guards = self.weights, self._guards
                assert weights is not None
                weights.placement()
        except MoecError as error:
            return error.message
        assert guards is not None
        return self._stale or guards.front.blocked() or self._process_wide() or ""

    def _process_wide(self) -> str | None:
        if _AUTOCAST():
            return "autocast is on"
        if self.replaced and _GLOBAL_HOOKS():
            return "hooks on all modules are registered, and the layer replaces submodules"
        return None

    def _blocked(self) -> str | None:
        if self._stale:
            return self._stale
        assert self._guards is not None
        return self._process_wide() or self._guards.front.blocked() or recorded_by()

    def _fall_back(
        self,
        reason: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        original: Callable[..., Any] | None = None,
    ) -> Any:
        note_fallback(self.layer, reason, strict=self.strict)
        return (original or self.original)(*args, **kwargs)

    def _record(self, recording: Recording) -> Executable:
        """What computes gradients itself, built on first use."""
        found = self._recorder
        if found is None:
            assert self.weights is not None
            found = self._recorder = recording(self.weights)
        return found

    def _with_gradients(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        executable, guards = self.ready(), self._guards
        assert guards is not None
        # Reads the module's attributes alone: the layer must not hold on to this method, which holds on to the module.
        layer = Layer(
            self.module,
            lambda args, kwargs: self.call(self.module, executable, args, kwargs),
            self.original,
            guards.changed,
            slots_of(self.module),
        )
        return run_with_gradients(layer, args, kwargs)

    def _hooked(self) -> bool:
        """Whether the backward, which runs the original again, would call hooks a second time."""
        inner = [m for m in self.module.modules() if m is not self.module]
        return any(getattr(m, name) for m in inner for name in HOOKS) or (bool(inner) and _GLOBAL_HOOKS())

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledMethod:
        module = memo.get(id(self.module))
        if module is None:
            raise MoecError("MOEC232", "a compiled method cannot be copied without its module", hint="copy the module")
        copy = type(self).__new__(type(self))
        copy.module, copy.method, copy.call, copy.store, copy.build = (
            module, self.method, self.call, self.store, self.build
        )  # fmt: skip
        copy.layer = memo.get(id(self.layer), self.layer)
        copy.replaced, copy.strict, copy.weights, copy.executable = self.replaced, self.strict, None, None
        copy.training, copy.graphed, copy.key = self.training, self.graphed, new_key()
        copy.recording, copy._recorder = self.recording, None
        watch(copy.key, copy)
        copy._taken, copy._guards = self._taken, None
        # Built on first use, when the new module is complete: it must then still be what it was copied from.
        copy._stale, copy._copied_from = self._stale, self._copied_from
        copy.restored = self.restored
        if self.weights is not None:
            copy._stale, copy._copied_from = self.moved(), (repr(self.module), self.weights.layouts)
        return copy

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickle holds the original module: the compiled code is made anew by moec.compile after loading.
        return getattr, (self.module, self.method)


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="a layer compiled by moec runs outside of the graph where gradients are recorded (compile it with "
    "training=True, or call it under torch.no_grad()), in training mode, under autocast, on inputs it was not "
    "verified with, and after a change"
)
def _eagerly(method: CompiledMethod, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Called while torch.compile traces, run outside of its graph."""
    return method(*args, **kwargs)


def _watch(weights: WeightStore, guards: Guards) -> tuple[WeightStore, Guards]:
    """Both, with the guards of each expert asked when its weights are read."""
    weights.watch({name: guard.check for name, guard in guards.by_weight.items()})
    return weights, guards
