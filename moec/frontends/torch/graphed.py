"""A compiled layer in graphs of torch.compile and torch.export: its own operations, and `moec::layer` for its experts.

T tokens. What is fixed for a graph is asked while it is traced; what depends on values is asked by the operator.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from moec.frontends.torch.calls import Call, DirectCall, PlacedCall, SlicedCall
from moec.frontends.torch.direct import Roles
from moec.frontends.torch.layer_op import watched
from moec.frontends.torch.layer_spec import Spec
from moec.frontends.torch.lift import DTYPES
from moec.frontends.torch.operands import is_expressible, table_of
from moec.frontends.torch.written import Written, attribute, write
from moec.ir import Region
from moec.weights import WeightStore

_NUMBERS = itertools.count()


def new_key() -> str:
    """A name for one installed layer, of this process alone."""
    return f"{os.getpid()}.{next(_NUMBERS)}"


@dataclass(frozen=True)
class Graphed:
    """One layer, for any copy of its module."""

    call: DirectCall | PlacedCall | SlicedCall
    written: Written
    params: Callable[[torch.nn.Module], Sequence[torch.Tensor]]
    spec: str
    no_gradients: str
    """Why it has no backward in graphs; empty if it has."""

    def with_gradients(self, why_not: str = "") -> Graphed:
        """The same with a backward, or with another reason why it has none."""
        spec = replace(Spec.of(self.spec), no_gradients=why_not)
        return replace(self, spec=spec.to_text(), no_gradients=why_not)

    def unfit(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Why these arguments are outside what was verified, as far as their shapes and types say."""
        return self.written.unfit(self.call.binder(args, kwargs))

    def run(self, module: torch.nn.Module, key: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer's result, as operations that a tracer sees."""
        bound = self.call.binder(args, kwargs)
        given = [bound[name] if name else None for name in self.written.inputs]
        return self.write(module, self.params(module), key, _shape, given)

    def write(
        self, module: Any, params: Sequence[torch.Tensor], key: str, sizes: Callable[[Any], Any], given: Sequence[Any]
    ) -> Any:
        """The same on anything that stands for tensors, such as a graph's proxies; `given` as `inputs` names it."""
        spec = self.spec

        def experts(rows: torch.Tensor, selector: Any, weights: Any) -> torch.Tensor:
            found: torch.Tensor = torch.ops.moec.layer.default(rows, selector, weights, params, spec, key)
            return found

        return self.written.function(module, experts, sizes, *given)


def _shape(x: torch.Tensor) -> torch.Size:
    return x.shape


def graphed(name: str, call: Call, region: Region, backend: str, pack: bool, store: WeightStore) -> Graphed | None:
    """How the layer stands in a graph; None where it cannot."""
    written = write(call)
    if written is None or not isinstance(call, DirectCall | PlacedCall | SlicedCall) or not is_expressible(store.views):
        return None
    table, names = table_of(store.views, store.layouts)
    roles = call.roles if isinstance(call, DirectCall) else _roles(call)
    result = region.outputs[0].type
    spec = Spec(
        name=name or "the model",
        region=str(region),
        backend=backend,
        pack=pack,
        table=table,
        roles=roles,
        experts=call.experts,
        inputs=call.inputs,
        lowest=call.ids.lowest if call.ids is not None else None,
        highest=call.ids.highest if call.ids is not None else None,
        width=int(str(result.shape[-1])),
        dtype=result.dtype,
    )
    assert result.dtype in DTYPES.values()
    return Graphed(call, written, _reader(names), spec.to_text(), spec.no_gradients)


def _roles(call: PlacedCall | SlicedCall) -> Roles:
    if isinstance(call, PlacedCall) or call.places is not None:
        return Roles("x", None, None, "places")
    given = call.sliced
    selector, weights = (None if one is None else name for one, name in ((given.selector, "ids"), (given.weights, "w")))
    return Roles("x", selector, weights, call.form, slots=call.num_slots, scale=call.scale, spread=call.spread)


def _reader(names: Sequence[str]) -> Callable[[torch.nn.Module], Sequence[torch.Tensor]]:
    """Reads parameters by attributes alone, in a function that tracers follow."""
    text = f"def params(module):\n    return [{', '.join(map(attribute, names))}]\n"
    space: dict[str, Any] = {}
    exec(compile(text, "<moec: parameters>", "exec"), space)  # text of our own making
    return space["params"]  # type: ignore[no-any-return]


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def why_not_now(key: str) -> str:
    """Asked once while a graph is traced: why the layer cannot serve its module now; empty if it can."""
    method = watched(key)
    return "the compiled layer is gone" if method is None else method.blocked_in_graph(tracing=True)


def wants_gradients(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the call would be recorded for a backward."""
    if not torch.is_grad_enabled():
        return False
    given = [*args, *kwargs.values()]
    if any(isinstance(t, torch.Tensor) and t.requires_grad for t in given):
        return True
    return any(p.requires_grad for p in module.parameters())
