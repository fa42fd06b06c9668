"""How whole models are compared: by every tensor they return, at a stated tolerance."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from moec.report import LayerReport, Report
from tests.frontend.compare import relative, tensors
from tests.hf.models import HfModel

# One layer is within 2e-6 of the original. Attention, norms and the next layers pass that on with gains of a few, and
# at most four layers follow each other here: five times the bar of one layer.
WHOLE = 1e-5


def run(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    with torch.no_grad():
        return model(**inputs, **options)


def assert_close(got: Any, want: Any, bar: float = WHOLE) -> None:
    """All tensors of two results agree: relative L2 and max|a-b| / max|b|."""
    mine, theirs = tensors(got), tensors(want)
    assert len(mine) == len(theirs) > 0
    for index, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if not b.is_floating_point():
            assert torch.equal(a, b), f"tensor {index}: integers differ"
            continue
        assert torch.isfinite(b).all()
        error = max(relative(a, b))
        assert error <= bar, f"tensor {index} {tuple(b.shape)}: error {error:.2e}, bar {bar:.1e}"


def assert_equal(got: Any, want: Any) -> None:
    """Bitwise."""
    assert all(torch.equal(a, b) for a, b in zip(tensors(got), tensors(want), strict=True))


def layer_of(path: str, layers: list[LayerReport]) -> list[LayerReport]:
    """The compiled layers at this path or in a part of it."""
    return [
        layer
        for layer in layers
        if layer.status == "compiled" and (layer.name == path or layer.name.startswith(path + "."))
    ]


def assert_all_compiled(report: Report, model: HfModel) -> None:
    listing = "\n".join(f"{layer.name} {layer.kind} {layer.status} {layer.reason}" for layer in report.layers)
    for path, kind in model.layers.items():
        found = [layer for layer in layer_of(path, report.layers) if layer.kind == kind]
        found = [layer for layer in found if not any(layer_of(other, [layer]) for other in model.optional)]
        assert len(found) == 1, f"{path}: {len(found)} compiled {kind} layers\n{listing}"
    known = (*model.layers, *model.optional)
    for layer in report.layers:
        if layer.status == "compiled":
            assert any(layer_of(path, [layer]) for path in known), f"{layer.name} is no layer\n{listing}"


@contextmanager
def told() -> Iterator[list[str]]:
    """Collects what moec warns about, as text."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    texts += [str(item.message) for item in caught if "MOEC" in str(item.message)]
