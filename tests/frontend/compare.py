"""Compare two modules from outside: what they return, what they leave behind, what they did to their arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

BAR = 2e-6  # fp32: relative L2 and max|a-b| / max|b|


@dataclass
class Outcome:
    """One call: the results, or the error; the arguments as the call left them; which results are arguments."""

    results: list[Any] = field(default_factory=list)
    structure: str = ""
    arguments: list[Tensor] = field(default_factory=list)
    aliases: list[tuple[int, int]] = field(default_factory=list)
    error: str = ""
    random_state: Tensor | None = None


def call(module: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Outcome:
    """Call with a fixed seed on copies of the arguments."""
    args, kwargs = pytree.tree_map_only(Tensor, keep_layout, (args, kwargs or {}))
    torch.manual_seed(11)
    given = tensors((args, kwargs))
    try:
        value = module(*args, **kwargs)
    except Exception as error:
        return Outcome(error=type(error).__name__, arguments=[a.clone() for a in given])
    leaves, spec = pytree.tree_flatten(value)
    aliases = [
        (i, j) for i, leaf in enumerate(leaves) for j, a in enumerate(given) if isinstance(leaf, Tensor) and leaf is a
    ]
    results = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return Outcome(results, str(spec), [a.clone() for a in given], aliases, "", torch.get_rng_state())


def keep_layout(tensor: Tensor) -> Tensor:
    """A copy with the same strides."""
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor)


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def difference(got: Outcome, want: Outcome, bar: float = BAR) -> str:
    """Empty if the same within `bar`, else what differs first."""
    if got.error != want.error:
        return f"raised {got.error or 'nothing'}, the original {want.error or 'nothing'}"
    if got.structure != want.structure:
        return f"returned {got.structure}, the original {want.structure}"
    if got.aliases != want.aliases:
        return f"results that are arguments: {got.aliases}, the original's {want.aliases}"
    for index, (a, b) in enumerate(zip(got.results, want.results, strict=True)):
        text = value_difference(a, b, bar)
        if text:
            return f"result {index}: {text}"
    for index, (a, b) in enumerate(zip(got.arguments, want.arguments, strict=True)):
        text = value_difference(a, b, bar)
        if text:
            return f"argument {index} after the call: {text}"
    states = (got.random_state, want.random_state)
    if states[0] is not None and states[1] is not None and not torch.equal(states[0], states[1]):
        return "the random generator was left in another state"
    return ""


def value_difference(a: Any, b: Any, bar: float) -> str:
    if not isinstance(b, Tensor):
        return "" if bool(a == b) else f"{a!r} instead of {b!r}"
    if not isinstance(a, Tensor):
        return f"{type(a).__name__} instead of a tensor"
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"{a.dtype} {tuple(a.shape)} instead of {b.dtype} {tuple(b.shape)}"
    if not b.is_floating_point():
        return "" if torch.equal(a, b) else "integers differ"
    for name, test in (("NaN", torch.isnan), ("infinite", torch.isinf)):
        if not torch.equal(test(a), test(b)):
            return f"{name} in {int(test(a).sum())} places, the original in {int(test(b).sum())}"
    a, b = (torch.nan_to_num(v.double(), 0.0, 0.0, 0.0) for v in (a, b))
    errors = relative(a, b)
    return "" if max(errors) <= bar else f"relative L2 error {errors[0]:.2e}, max error {errors[1]:.2e}, bar {bar:.1e}"


def relative(a: Tensor, b: Tensor) -> tuple[float, float]:
    """||a-b|| / ||b||, max|a-b| / max|b|; 0/0 is 0. Results below 1e-30 count as that: denormals have few digits."""
    if b.numel() == 0:
        return 0.0, 0.0
    a, b = a.detach().double(), b.detach().double()
    parts = (((a - b).norm(), b.norm()), ((a - b).abs().max(), b.abs().max()))
    pair = [float(d / n.clamp(min=1e-30)) for d, n in parts]
    return pair[0], pair[1]


def freeze(value: Any) -> Any:
    """A comparable copy of an attribute: tensors by value, containers by content, anything else by identity."""
    if isinstance(value, Tensor):
        return ("tensor", value.dtype, value.detach().clone())
    if isinstance(value, (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)):
        return value
    if isinstance(value, dict):
        return {key: freeze(item) for key, item in value.items() if not isinstance(item, nn.Module)}
    if isinstance(value, (list, tuple, set)):
        return [freeze(item) for item in value]
    return id(value)


def frozen_difference(a: Any, b: Any, bar: float, *, identities: bool = True) -> str:
    """Empty if two frozen values agree; `identities=False` skips objects known only by identity."""
    if isinstance(b, tuple) and b and b[0] == "tensor":
        if not (isinstance(a, tuple) and a and a[0] == "tensor"):
            return f"{a!r} instead of a tensor"
        return value_difference(a[2], b[2], bar)
    if isinstance(b, dict):
        if not isinstance(a, dict):
            return f"{type(a).__name__} instead of a dict"
        for key, item in b.items():
            text = frozen_difference(a[key], item, bar, identities=identities) if key in a else "missing"
            if text:
                return f"[{key!r}]: {text}"
        return "" if not identities or len(a) == len(b) else f"has new keys {sorted(map(str, a.keys() - b.keys()))}"
    if isinstance(b, list):
        if not isinstance(a, list) or len(a) != len(b):
            return f"{a!r} instead of {b!r}"
        texts = (frozen_difference(x, y, bar, identities=identities) for x, y in zip(a, b, strict=True))
        return next((text for text in texts if text), "")
    if not identities and isinstance(b, int) and not isinstance(b, bool) and b > 1 << 32:
        return ""
    return "" if a == b else f"{a!r} instead of {b!r}"


def state(module: nn.Module) -> dict[str, Any]:
    """Everything the module and its parts hold, frozen."""
    return {name: freeze(vars(part)) for name, part in module.named_modules(remove_duplicate=False)}


def state_difference(got: dict[str, Any], want: dict[str, Any], *, exact: bool) -> str:
    """`exact`: nothing new, same objects. Otherwise: what the original holds, the other one holds too."""
    for name, attributes in want.items():
        if name not in got:
            return f"part {name!r} is gone"
        # Hooks are numbered by a global counter, so two instances never agree on them.
        held = {key: value for key, value in attributes.items() if exact or "_hooks" not in key}
        text = frozen_difference(got[name], held, 0.0 if exact else BAR, identities=exact)
        if text:
            return f"{name or 'the module'}{text}"
    return f"new parts {sorted(got.keys() - want.keys())}" if exact and len(got) != len(want) else ""
