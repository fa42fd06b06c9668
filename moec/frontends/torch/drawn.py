"""A block that has effects, as a reason; one that draws random numbers is shown by its results under two seeds."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from moec.frontends.torch.effects import Watch
from moec.frontends.torch.observe import Driver, ProbeFailed, users_code
from moec.frontends.torch.reasons import NotLifted
from moec.trees import tree_flatten

_DRAWS = "draws random numbers"


def with_effects(driver: Driver, effects: Sequence[str]) -> NotLifted:
    """The reason for a block that is no function of its input."""
    return NotLifted(f"the block {effects[0]}", by_seeds(driver) if _DRAWS in effects else "")


def by_seeds(driver: Driver) -> str:
    """The element of the result that two seeds change most, in words."""
    try:
        first, second = (_result(driver, seed) for seed in (1, 2))
    except ProbeFailed:
        return ""
    if first is None or second is None:
        return ""
    if first.shape != second.shape:
        return f"its result is {list(first.shape)} with one seed and {list(second.shape)} with another"
    gap = (first - second).abs().flatten()
    if not gap.numel() or not float(gap.max()) > 0:
        return "its result is the same with two seeds"
    at = int(gap.argmax())
    place = ", ".join(str(int(i)) for i in torch.unravel_index(torch.tensor(at), first.shape))
    there, then = float(first.flatten()[at]), float(second.flatten()[at])
    return f"the result at [{place}] is {there:.4g} with one seed and {then:.4g} with another"


def _result(driver: Driver, seed: int) -> torch.Tensor | None:
    """The first tensor of floats that the block returns; what the run changed is put back."""
    tensors = [t for t in tree_flatten((driver.args, driver.kwargs))[0] if isinstance(t, torch.Tensor)]
    copies = {id(t): t.clone() for t in tensors}
    watch = Watch(driver.module, tensors, hear=True)
    try:
        random.seed(seed)
        torch.default_generator.manual_seed(seed)
        for device, _ in watch.gpu_rng:
            torch.cuda.default_generators[device.index or 0].manual_seed(seed)
        leaves, spec = tree_flatten((driver.args, driver.kwargs))
        args, kwargs = spec.unflatten([copies.get(id(leaf), leaf) for leaf in leaves])
        with users_code(driver.path), torch.no_grad():
            result = driver.module(*args, **kwargs)
    finally:
        watch.undo()
    found = [t for t in tree_flatten(result)[0] if isinstance(t, torch.Tensor) and t.is_floating_point()]
    return found[0].detach().float().cpu() if found else None
