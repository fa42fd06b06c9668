"""Which blocks with a mixture go through torch.export and torch.compile(fullgraph=True), as written and compiled.

`python -m tests.zoo.graphs [FAMILY ...]` prints a row for each family: its first block with a mixture, alone, with
leading sizes dynamic, and compared at sizes that were not traced.
"""

from __future__ import annotations

import copy
import inspect
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import moec
from tests.frontend.compare import relative
from tests.zoo.families import FAMILIES
from tests.zoo.model import inputs, make

WAYS = ("torch.export", "fullgraph")
BAR = 1e-4
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """What became of one block: "ok", or the error, by way; `layers` counts `moec::layer` in the exported program."""

    written: Mapping[str, str]
    compiled: Mapping[str, str]
    layers: int
    left_out: bool
    """The report says that one of the layers has no form in graphs."""


def block_of(report: Any) -> str | None:
    """The first module that holds routing and experts of a compiled mixture."""
    for layer in report.layers:
        if layer.compiled and layer.kind == "moe":
            return str(layer.name if layer.cut == "slice" else layer.name.rpartition(".")[0])
    return None


def call_of(model: nn.Module, path: str, given: Mapping[str, Tensor]) -> Call:
    """The arguments of the block's first call."""
    seen: list[Call] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append((args, kwargs))

    handle = model.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            model(**given)
    finally:
        handle.remove()
    return seen[0]


def _sizes(block: nn.Module, call: Call) -> dict[str, Any]:
    def axes(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() < 2:
            return None
        return dict.fromkeys(range(leaf.dim() - 1), torch.export.Dim.AUTO)

    bound = inspect.signature(block.forward).bind(*call[0], **call[1])
    return {name: tree_map(axes, value) for name, value in bound.arguments.items()}


def attempt(block: nn.Module, way: str, traced: Call, other: Call, want: Sequence[Tensor]) -> tuple[str, int]:
    """Trace on one call, compare on another: "ok" or what went wrong, and the number of layers in the graph."""
    count = 0
    traced, other = copy.deepcopy(traced), copy.deepcopy(other)  # caches among the arguments grow
    try:
        with torch.no_grad():
            if way == "torch.export":
                program = torch.export.export(block, *traced, dynamic_shapes=_sizes(block, traced))
                count = sum(node.target is torch.ops.moec.layer.default for node in program.graph.nodes)
                got = program.module()(*other[0], **other[1])
            else:
                torch._dynamo.reset()
                graph: Any = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
                graph(*traced[0], **traced[1])
                got = graph(*other[0], **other[1])
    except Exception as error:  # torch raises dozens of kinds
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else ''}"[:100], count
    gap = max(max(relative(a, b)) for a, b in zip(tensors(got), want, strict=True) if b.is_floating_point())
    return ("ok" if gap <= BAR else f"differs by {gap:.1e}"), count


def tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def row(family: str) -> Row | None:
    """The family's row; None where no mixture is compiled."""
    entry = FAMILIES[family]
    model = make(entry)
    fast = moec.compile(model, example_inputs=inputs(entry))
    path = block_of(fast.moec.report)
    if path is None:
        return None
    traced, other = call_of(model, path, inputs(entry)), call_of(model, path, inputs(entry, 3, 11, seed=5))
    with torch.no_grad():
        args, kwargs = copy.deepcopy(other)
        want = tensors(model.get_submodule(path)(*args, **kwargs))
    found: list[dict[str, str]] = []
    layers = 0
    for one in (model, fast):
        found.append({})
        for way in WAYS:
            found[-1][way], count = attempt(one.get_submodule(path), way, traced, other, want)
            layers = max(layers, count)
    left_out = any("left out of graphs" in line for layer in fast.moec.report.layers for line in layer.evidence)
    return Row(found[0], found[1], layers, left_out)


def main(chosen: Sequence[str]) -> None:
    counts = dict.fromkeys([(which, way) for which in ("written", "compiled") for way in WAYS], 0)
    for family in chosen or FAMILIES:
        found = row(family)
        if found is None:
            print(f"{family}: no mixture is compiled", flush=True)
            continue
        for which in ("written", "compiled"):
            for way in WAYS:
                counts[which, way] += getattr(found, which)[way] == "ok"
        print(f"{family}: written {dict(found.written)}; compiled {dict(found.compiled)}", flush=True)
    print(f"of {len(chosen or FAMILIES)} families:", {" ".join(key): count for key, count in counts.items()})


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    main(sys.argv[1:])
