"""Whether gradients that a back end computes are the original's: compared by value, like results.

E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch

from moec.backendbase import Executable, load_backend
from moec.errors import MoecError
from moec.frontends.torch.graphed import Graphed
from moec.frontends.torch.lifted import Lifted
from moec.frontends.torch.method import Recording
from moec.frontends.torch.recompute import in_place, slots_of
from moec.ir import Region
from moec.report import LayerReport
from moec.trees import tree_flatten, tree_unflatten
from moec.verify import FP32_LONG_BAR, LOW_PRECISION_LIMIT, Probe, compare_results, difference
from moec.weights import WeightStore

_PROBES = 6
_FACTOR = 10.0
"""Gradients go through more products than results, each rounded."""
_CANCELLED = 100.0
"""What a router's parameters get is a small difference of large terms, whose roundings remain."""


@runtime_checkable
class Records(Protocol):
    """A back end that computes gradients itself."""

    def recording(self, region: Region, weights: WeightStore, *, absent: bool = False) -> Executable | str:
        """The region, its results part of the autograd graph of its inputs and of the store's parameters.

        Or why there is none. `absent`: parameters of experts without tokens get no gradient instead of zeros.
        """
        ...


def recording_of(lifted: Lifted, layer: LayerReport, region: Region, backend: str) -> Recording | None:
    """How to build what computes gradients, where the back end does and they are the original's; the report says so."""
    found, store = load_backend(backend), WeightStore(lifted.module, lifted.views)
    checked = GradientCheck(f"back end {backend} computes none")
    if isinstance(found, Records):
        built = found.recording(region, store)
        checked = GradientCheck(built) if isinstance(built, str) else _checked(lifted, built, store.params)
    by = f"kernels, {checked.error:.1e} from the original's"
    by = f"running the original again: {checked.why}" if checked.why else by
    layer.evidence = (*layer.evidence, f"gradients by {by}")

    def build(weights: WeightStore) -> Executable:
        assert isinstance(found, Records)
        executable = found.recording(region, weights, absent=checked.absent)
        assert not isinstance(executable, str), executable
        return executable

    return None if checked.why else build


def graphed_with_gradients(lifted: Lifted, layer: LayerReport, graph: Graphed) -> Graphed:
    """The layer with a backward in graphs, where its gradients there are the original's; the report says so."""
    able = graph.with_gradients()
    try:
        names = WeightStore(lifted.module, lifted.views).params
        checked = check_gradients(lifted, lambda *a, **k: able.run(lifted.module, "", a, k), names)
    except MoecError as error:
        checked = GradientCheck(error.message)
    said = f"no gradients in graphs: {checked.why}" if checked.why else f"gradients in graphs, {checked.error:.1e} from"
    layer.evidence = (*layer.evidence, said if checked.why else f"{said} the original's")
    return graph.with_gradients(checked.why) if checked.why else able


@dataclass(frozen=True)
class GradientCheck:
    """What comparing gradients found."""

    why: str = ""
    """How they differ; empty if they do not."""
    error: float = 0.0
    """The worst relative L2, over inputs and the experts' parameters."""
    absent: bool = False
    """Whether the original leaves parameters of experts without tokens without a gradient, instead of zeros."""


@dataclass(frozen=True)
class _Found:
    outs: Sequence[torch.Tensor]
    gradients: dict[str, torch.Tensor | None]


def _checked(lifted: Lifted, executable: Executable, experts: Sequence[str]) -> GradientCheck:
    return check_gradients(lifted, lambda *a, **k: lifted.call(lifted.module, executable, a, k), experts)


def check_gradients(lifted: Lifted, run: Callable[..., Any], experts: Sequence[str]) -> GradientCheck:
    """Gradients of inputs and of all parameters over the first probes; `experts` names the experts' parameters."""
    worst, absent = 0.0, False
    probes = (probe for probe in lifted.probes() if "not-a-number" not in probe.label)
    for probe in islice(probes, _PROBES):
        try:
            theirs = _gradients(lifted, probe, lifted.original)
            mine = _gradients(lifted, probe, run)
        except MoecError:
            raise
        except Exception as error:  # the user's code, in a mode that it was not observed in
            return GradientCheck(f"recording them raises {type(error).__name__}: {error}")
        found = _compare(lifted, mine, theirs, experts)
        worst, absent = max(worst, found.error), absent or found.absent
        if found.why:
            return GradientCheck(f"{found.why}, at {probe.label}", worst)
    return GradientCheck("", worst, absent)


def _gradients(lifted: Lifted, probe: Probe, run: Callable[..., Any]) -> _Found:
    """Results, and gradients of float arguments and parameters for random gradients of the results."""
    leaves, spec = tree_flatten((probe.args, probe.kwargs))
    inputs = {i: _stand_in(t) for i, t in enumerate(leaves) if isinstance(t, torch.Tensor) and t.is_floating_point()}
    slots = slots_of(lifted.module)
    params = {id(s.tensor): _stand_in(s.tensor) for s in slots if s.tensor.is_floating_point()}
    names = {id(s.tensor): s.name for s in reversed(slots)}
    with torch.enable_grad(), in_place([(slot, params.get(id(slot.tensor), slot.tensor)) for slot in slots]):
        # Copies, as the code may write to its arguments.
        given = [inputs[i].clone() if i in inputs else leaf for i, leaf in enumerate(leaves)]
        args, kwargs = tree_unflatten(given, spec)
        outs = [t for t in tree_flatten(run(*args, **kwargs))[0] if isinstance(t, torch.Tensor) and t.requires_grad]
        generator = torch.Generator().manual_seed(7)
        seeds = [torch.randn(t.shape, generator=generator).to(t.device, t.dtype) for t in outs]
        wanted = [*inputs.values(), *params.values()]
        found = torch.autograd.grad(outs, wanted, seeds, allow_unused=True) if outs else (None,) * len(wanted)
    labels = [f"argument {i}" for i in inputs] + [names[key] for key in params]
    return _Found([t.detach() for t in outs], dict(zip(labels, found, strict=True)))


def _stand_in(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_()


def _compare(lifted: Lifted, mine: _Found, theirs: _Found, experts: Sequence[str]) -> GradientCheck:
    """Results and gradients by relative L2; no gradient is as good as zeros."""
    bar = LOW_PRECISION_LIMIT.get(lifted.dtype, FP32_LONG_BAR)
    apart = compare_results(list(mine.outs), list(theirs.outs))
    if apart.mismatch or apart.l2 > bar:
        return GradientCheck(f"recording gradients changes the result ({apart.mismatch or f'{apart.l2:.1e}'})")
    worst, absent = 0.0, False
    for name, want in theirs.gradients.items():
        got = mine.gradients[name]
        if want is None or got is None:
            rest = want if got is None else got
            if rest is not None and bool(rest.any()):
                return GradientCheck(f"{name} gets {'no' if got is None else 'a'} gradient")
            absent |= want is None and got is not None and name in experts
            continue
        found = difference(got, want)
        routed = name not in experts and not name.startswith("argument ")
        limit = bar * _FACTOR if lifted.dtype not in LOW_PRECISION_LIMIT else bar * 2
        if found.mismatch or not found.l2 <= (min(limit * _CANCELLED, 0.3) if routed else limit):
            return GradientCheck(f"that of {name} is off by {found.mismatch or f'{found.l2:.1e}'}", worst)
        worst = worst if routed else max(worst, found.l2)
    return GradientCheck("", worst, absent)
