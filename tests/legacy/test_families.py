"""Every MoE family of an older transformers release: its blocks compiled, results and tokens equal.

MOEC_LEGACY names the release, 4.46 or 4.57.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import moec
from moec.report import LayerReport
from tests.frontend.compare import relative, tensors
from tests.legacy.families import MORE, OLD

transformers = pytest.importorskip("transformers")
RELEASE = os.environ["MOEC_LEGACY"]
FAMILIES = {family.name: family for family in (OLD if RELEASE == "4.46" else (*OLD, *MORE))}
RUNNING = [name for name, family in FAMILIES.items() if not family.broken]
COMPILED = [name for name in RUNNING if not FAMILIES[name].refused]
# One layer is within 2e-6; a few layers follow each other.
BAR = 1e-5

pytestmark = pytest.mark.filterwarnings("ignore")


@cache
def pair(name: str) -> tuple[Any, Any]:
    """(original, compiled)"""
    model = FAMILIES[name].make()
    return model, moec.compile(model, example_inputs=FAMILIES[name].inputs(2, 7, 0))


def at(path: str, layers: list[LayerReport]) -> list[LayerReport]:
    """The layers at this path or in a part of it."""
    return [layer for layer in layers if layer.name == path or layer.name.startswith(path + ".")]


def mixtures(name: str, block: str) -> list[LayerReport]:
    """What was compiled of a block as a mixture; a dense FFN inside of it does not count."""
    layers = at(block, pair(name)[1].moec.report.layers)
    return [layer for layer in layers if layer.kind == "moe" and layer.status == "compiled"]


def test_the_release() -> None:
    assert transformers.__version__.startswith(RELEASE + ".")


def test_the_bar() -> None:
    """How many families must compile; the rest is refused or does not run at all."""
    good = [name for name in COMPILED if all(mixtures(name, block) for block in FAMILIES[name].blocks)]
    assert len(good) >= {"4.46": 10, "4.57": 29}[RELEASE], sorted(set(FAMILIES) - set(good))


@pytest.mark.parametrize("name", COMPILED)
def test_every_block_is_compiled_as_a_mixture(name: str) -> None:
    report = pair(name)[1].moec.report
    listing = "\n".join(f"{layer.name} {layer.kind} {layer.status} {layer.reason}" for layer in report.layers)
    for block in FAMILIES[name].blocks:
        found = mixtures(name, block)
        assert len(found) == 1, listing
        assert found[0].max_error is not None
        assert found[0].bar is not None
        assert found[0].max_error <= found[0].bar


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 11), (2, 40), (5, 2)], ids=str)
def test_results_at_shapes_not_probed(name: str, shape: tuple[int, int]) -> None:
    original, fast = pair(name)
    inputs = FAMILIES[name].inputs(*shape, sum(shape))
    with torch.no_grad():
        want, got = tensors(original(**inputs)), tensors(fast(**inputs))
    assert len(got) == len(want) > 0
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        if b.is_floating_point() and b.numel():
            assert torch.isfinite(b).all()
            assert max(relative(a, b)) <= BAR
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", [name for name in COMPILED if FAMILIES[name].generates])
def test_the_same_tokens(name: str) -> None:
    original, fast = pair(name)
    start: Tensor = FAMILIES[name].inputs(2, 6, 8)["input_ids"]
    options = {"max_new_tokens": 8, "do_sample": False, "no_repeat_ngram_size": 2}
    want = original.generate(input_ids=start, **options)
    assert torch.equal(fast.generate(input_ids=start, **options), want)
    assert len(set(want[0].tolist())) > 3


@pytest.mark.parametrize("name", [name for name in RUNNING if FAMILIES[name].refused])
def test_what_is_refused_says_why(name: str) -> None:
    family = FAMILIES[name]
    for block in family.blocks:
        assert not mixtures(name, block)
        refused = [layer for layer in at(block, pair(name)[1].moec.report.layers) if layer.kind == "moe"]
        assert any(family.refused in layer.reason for layer in refused), [layer.reason for layer in refused]


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.broken])
def test_what_does_not_run_by_itself(name: str) -> None:
    family = FAMILIES[name]
    with pytest.raises(Exception, match=family.broken), torch.no_grad():
        family.make()(**family.inputs(2, 7, 0))
