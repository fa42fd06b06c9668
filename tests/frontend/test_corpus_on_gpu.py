"""Every module of the corpus on a GPU: compiled to kernels and right, or left alone; never silently wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map_only

import moec
from tests.corpus import CASES
from tests.corpus.case import random_tokens
from tests.frontend.compare import call, difference
from tests.frontend.observed import example

# Sums on a GPU are taken in another order than the original's, which is not exact itself.
BAR = 2e-5
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
# Outputs of these depend on more than their arguments, so that two runs of the original differ as well.
ALONE = [name for name, case in CASES.items() if not (name.startswith("inline.") or case.stateful or case.random)]


def there(value: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda t: t.cuda(), value)


@pytest.mark.parametrize("name", ALONE)
def test_outputs_are_the_originals(name: str) -> None:
    case = CASES[name]
    original, reference = case.make().cuda(), case.make().cuda()
    try:
        reference(*there(example(case)))
    except RuntimeError as error:
        pytest.skip(f"the original does not run on a GPU: {error}")
    fast = moec.compile(original, example_inputs=there(example(case)))
    if not fast.moec.report.compiled:
        return  # which runs its own code; where rows overwrite each other, the last one is chance
    for tokens in (1, 3, 33, 300):
        for scale in (1.0, 8.0):
            args = case.inputs(random_tokens(tokens, case.dim, scale=scale, seed=100 + tokens))
            with torch.no_grad():
                found = difference(call(fast, there(args)), call(reference, there(args)), BAR)
            assert not found, f"{tokens} tokens at scale {scale}: {found}"
