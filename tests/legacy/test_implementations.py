"""transformers 5.0 and 5.8: their own implementations of experts, each compiled as it is written, results equal.

MOEC_LEGACY names the release. B sequences, S tokens a sequence.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

import moec
from tests.frontend.compare import relative, tensors
from tests.legacy.families import MORE, OLD

transformers = pytest.importorskip("transformers")
RELEASE = os.environ["MOEC_LEGACY"]
NAMES = ("mixtral", "olmoe", "qwen2_moe", "deepseek_v3", "glm4_moe", "gpt_oss", "qwen3_moe")
FAMILIES = {family.name: family for family in (*OLD, *MORE) if family.name in NAMES}
BAR = 1e-5

pytestmark = pytest.mark.filterwarnings("ignore")


def made(name: str, implementation: str) -> Any:
    model = FAMILIES[name].make()
    model.set_experts_implementation(implementation)
    return model


def test_the_release() -> None:
    assert transformers.__version__.startswith(RELEASE + ".")


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", NAMES)
def test_every_block_is_compiled_as_a_mixture(name: str, implementation: str) -> None:
    model, inputs = made(name, implementation), FAMILIES[name].inputs
    fast = moec.compile(model, example_inputs=inputs(2, 7, 0))
    report = fast.moec.report
    mixtures = [layer for layer in report.layers if layer.kind == "moe"]
    assert len(mixtures) == 2
    assert all(layer.compiled for layer in mixtures), report
    for shape in ((1, 1), (3, 11), (2, 40)):
        with torch.no_grad():
            want, got = tensors(model(**inputs(*shape, 3))), tensors(fast(**inputs(*shape, 3)))
        assert len(got) == len(want) > 0
        for a, b in zip(got, want, strict=True):
            assert max(relative(a, b)) <= BAR
    assert all(layer.fallbacks == 0 for layer in mixtures)
