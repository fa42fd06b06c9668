"""Blocks that torch cannot trace as they are written, and can when compiled."""

from __future__ import annotations

import pytest

from tests.zoo.families import FAMILIES
from tests.zoo.graphs import row
from tests.zoo.model import RELEASE, transformers

pytestmark = [
    pytest.mark.skipif(not transformers.__version__.startswith(RELEASE), reason="the zoo of another release"),
    pytest.mark.filterwarnings("ignore"),
]
QUICK = ("mixtral", "nllb_moe")
# Casts a module in its forward, or takes a cache: torch.export refuses the code around the layer.
AROUND = frozenset({"switch_transformers", "nllb_moe", "diffusion_gemma", "gemma4"})


@pytest.mark.parametrize("family", [pytest.param(f, marks=[] if f in QUICK else pytest.mark.slow) for f in FAMILIES])
def test_compiled_blocks_are_traced(family: str) -> None:
    found = row(family)
    if found is None:
        pytest.skip("no mixture of it is compiled")
    assert found.compiled["fullgraph"] == "ok" or found.left_out or family in AROUND, found
    assert not any("differs" in told for told in found.compiled.values()), found
    if family == "mixtral":
        assert found.compiled["torch.export"] == "ok"
        assert found.layers == 1
        assert not found.left_out
        assert "ok" not in found.written.values()
