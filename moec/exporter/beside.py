"""Two graphs on the same inputs: their outputs, and the experts that their routers choose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moec.backends.onnx.providers import CPU, providers_of
from moec.backends.onnx.runtime import session
from moec.errors import MoecError
from moec.exporter.check import LEAST_AGREEMENT, MODEL_BAR, ROUNDED_MODEL_BAR, Check
from moec.exporter.invent import Feed
from moec.exporter.settings import Settings
from moec.frontends.onnx.graphs import forget_unused
from moec.frontends.onnx.layer import Run

# Of files that compute in 16 bits.
LOW_MODEL_BARS = {"FLOAT16": 1e-2, "BFLOAT16": 6e-2}


@dataclass
class Made:
    """Inputs, and what the graph as it is makes of them."""

    label: str
    feed: Feed
    outputs: list[Any]


@dataclass
class Compared:
    """How the rewritten graph compares, and how many of its routers' choices are the same."""

    check: Check
    same: int = 0
    total: int = 0


def beside(
    model: Any, chosen: Sequence[str], made: Sequence[Made], runs: Sequence[Run], settings: Settings, title: str
) -> Compared:
    """Run a rewritten graph on the inputs that the original was run on; `runs` has what its routers chose.

    Raises MOEC704 where it differs.
    """
    runtime = _with_outputs(model, chosen, providers_of(settings.target))
    computed = [output.dtype for node in model.graph.all_nodes() for output in node.outputs if output.dtype is not None]
    low = max((LOW_MODEL_BARS.get(dtype.name, 0.0) for dtype in computed), default=0.0)
    check = Check(bar=ROUNDED_MODEL_BAR if settings.quantize else max(MODEL_BAR, low), loose=10.0)
    same = total = 0
    for one, run in zip(made, runs, strict=True):
        mine = runner(runtime, one.feed)()
        check.labels.append(one.label)
        for a, b in zip(mine, one.outputs, strict=False):
            _add(check, one.label, a, b)
        for name, a in zip(chosen, mine[len(one.outputs) :], strict=True):
            same, total = same + int((np.sort(a, -1) == np.sort(run[name], -1)).sum()), total + a.size
    if settings.quantize is None and total and same < LEAST_AGREEMENT * total:
        raise MoecError("MOEC704", f"the routers of {title} make {same / total:.1%} of the original's choices")
    if check.why and not (same < total and "error" in check.why):
        raise MoecError("MOEC704", f"{title} differs: {check.why}", hint="nothing was written")
    return Compared(check, same, total)


def _add(check: Check, label: str, a: Any, b: Any) -> None:
    """Compare two outputs: tensors, sequences of them, or text."""
    if isinstance(b, list):
        if len(a) != len(b):
            check.why = check.why or f"{label}: a sequence of {len(a)} instead of {len(b)}"
        for mine, theirs in zip(a, b, strict=False):
            _add(check, label, mine, theirs)
    elif isinstance(b, np.ndarray) and b.dtype.kind in "biuf":
        check.add(label, _tensor(a), _tensor(b))
    elif not np.array_equal(a, b):
        check.why = check.why or f"{label}: other text"


def _with_outputs(model: Any, names: Sequence[str], providers: Sequence[Any] = (CPU,)) -> Any:
    """A session that also gives these values; nodes that neither they nor the outputs need are gone."""
    values = {value.name: value for node in model.graph for value in node.outputs}
    forget_unused(model, [values[name] for name in names])
    outputs = model.graph.outputs
    count = len(outputs)
    outputs.extend(values[name] for name in names)
    try:
        return session(model, providers=providers)
    finally:
        del outputs[count:]


def _tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def runner(runtime: Any, feed: Mapping[str, Any]) -> Callable[[], Any]:
    """A call of a session on these inputs, of which it may not need all."""
    known = {one.name for one in runtime.get_inputs()}
    needed = {name: array for name, array in feed.items() if name in known}
    return lambda: runtime.run(None, needed)
