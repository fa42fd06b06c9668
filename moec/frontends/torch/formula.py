"""An activation without a name, as a formula: the recorded elementwise operations written down.

Only numbers, the expert's hidden values and operations of one element each are understood. What is read off is checked
by values like every name.

F expert width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from moec.errors import MoecError
from moec.frontends.torch.activation import Ask, synthetic
from moec.frontends.torch.coordinates import MOVES
from moec.frontends.torch.instances import Instance
from moec.frontends.torch.oplog import HOST_READ, Entry, Log, Ref
from moec.frontends.torch.replay import replay
from moec.ir.formula import UNARY, Formula, fold, number, parse_formula

# ATen's names; in-place ones are written without their underscore.
_ARITHMETIC = {"add": "+", "sub": "-", "mul": "*", "div": "/", "true_divide": "/", "subtract": "-", "multiply": "*"}
_CASTS = frozenset({"_to_copy", "clone", "alias", "detach", "contiguous"})
_TORCH: dict[str, Callable[..., torch.Tensor]] = {
    "+": torch.add,
    "-": torch.sub,
    "*": torch.mul,
    "/": torch.div,
    "clamp": torch.clamp,
    "min": torch.minimum,
    "max": torch.maximum,
    **{name: getattr(torch, name) for name in ("exp", "square", "abs", "neg", "sigmoid", "tanh")},
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "softplus": F.softplus,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu2": lambda x: F.relu(x).square(),
}
_LINEAR = frozenset({"+", "-", "*", "/", "neg", "a", "b", "number"})


@dataclass(frozen=True)
class Written:
    """An activation as a formula of a, the first layer's (first) values, and b, its second's, where there are any."""

    text: str
    gated: bool
    split: str | None = None
    """How a and b lie in the outputs of one matrix, "concat" or "interleaved"; None where each has its own."""

    @property
    def layout(self) -> str | None:
        return "pair" if self.gated else None

    def __str__(self) -> str:
        return f"{self.text}, where a is gate and b up" if self.gated else self.text

    def __call__(self, hidden: Sequence[torch.Tensor]) -> torch.Tensor:
        given = dict(zip("ab", hidden, strict=False))

        def leaf(at: Formula) -> torch.Tensor:
            return given[at.fn] if at.fn in given else hidden[0].new_tensor(at.value)

        return fold(parse_formula(self.text), leaf, lambda fn, args: _TORCH[fn](*args))


def write_activation(
    log: Log, instance: Instance, width: int, ask: Ask, tolerance: float, axis: int = -1
) -> Written | None:
    """The formula of the entries between an expert's layers, None where there is none.

    `width` is F, `axis` where the outputs lie in the first product's result.
    """
    made = _walk(log, instance, width, axis)
    if made is None or _is_linear(made[0]):
        return None
    formula, split = made
    written = Written(str(formula), formula.operands == {"a", "b"}, split)
    if "a" not in formula.operands:
        return None
    try:
        parse_formula(written.text)
    except MoecError:  # too deep to write down
        return None
    widths = [up.weight.shape[0] for up in instance.ups]
    for seed in range(max(4, min(64, 600 // sum(widths)))):
        vectors = synthetic(widths, seed)
        parts = _halves(vectors[0], split) if split is not None else vectors
        mine, theirs = written(parts), ask([v.clone() for v in vectors]).cpu()
        if mine.shape != theirs.shape or not torch.allclose(mine, theirs, rtol=tolerance, atol=tolerance):
            return None
    return written


def _is_linear(formula: Formula) -> bool:
    """Whether it bends nothing: a sum or a scaling of one layer is no activation."""
    named: list[str] = []
    fold(formula, lambda at: named.append(at.fn), lambda fn, args: named.append(fn))
    return set(named) <= _LINEAR


def _halves(both: torch.Tensor, split: str) -> Sequence[torch.Tensor]:
    return (both[0::2], both[1::2]) if split == "interleaved" else both.chunk(2)


def _walk(log: Log, instance: Instance, width: int, axis: int) -> tuple[Formula, str | None] | None:
    """The formula of what the second layer reads, and how one matrix's outputs are split."""
    assert instance.down is not None
    known: dict[int, Formula] = {}
    splits: set[str] = set()
    outs = [up.out for up in instance.ups]
    if len(outs) == 2:
        known.update(zip(outs, (Formula("a"), Formula("b")), strict=True))
    elif instance.ups[0].weight.shape[0] == width:
        known[outs[0]] = Formula("a")
    masked = {mask.entry: mask.data for mask in instance.masks}
    if instance.scale is not None:
        masked[instance.scale.entry] = instance.scale.data
    for index in instance.middle:
        entry = log.entries[index]
        if entry.op == HOST_READ:
            continue
        if index in masked:
            if masked[index] in known:
                known[entry.results[0]] = known[masked[index]]
            continue
        if entry.name in MOVES and not any(slot in known for slot in entry.reads):
            for slot in entry.results:
                place = _place(log, instance, slot, width, axis)
                if place is not None:
                    known[slot] = Formula(place[0])
                    splits.add(place[1])
            continue
        made = _apply(log, entry, known)
        if made is None or len(entry.results) != 1:
            return None
        known[entry.results[0]] = made
    formula = known.get(instance.down.source)
    if formula is None or len(splits) > 1:
        return None
    return formula, next(iter(splits), None)


def _place(log: Log, instance: Instance, slot: int, width: int, axis: int) -> tuple[str, str] | None:
    """Which half of one matrix's outputs a moved tensor holds: (a or b, how they are split)."""
    like = log.tensors[instance.ups[0].out]
    if len(instance.ups) > 1 or like.shape[axis] != 2 * width or log.tensors[slot].shape[-1] != width:
        return None
    shape = [1] * like.dim()
    shape[axis] = -1
    numbers = torch.arange(2 * width, device=like.device, dtype=torch.float64).reshape(shape).expand(like.shape)
    masked = {mask.entry for mask in instance.masks}
    moves = [i for i in instance.middle if log.entries[i].name in MOVES or i in masked]
    given = {mask.operand: mask.keeping(log) for mask in instance.masks}
    try:
        moved = replay(log, moves, {**given, instance.ups[0].out: numbers.clone()}, slot)
    except (RuntimeError, ValueError, KeyError, TypeError):
        return None
    row = moved.reshape(-1, width)[0].cpu()
    every = torch.arange(width, dtype=row.dtype)
    for name, split, expected in (
        ("a", "concat", every),
        ("b", "concat", every + width),
        ("a", "interleaved", 2 * every),
        ("b", "interleaved", 2 * every + 1),
    ):
        if torch.equal(row, expected):
            return name, split
    return None


def _apply(log: Log, entry: Entry, known: Mapping[int, Formula]) -> Formula | None:
    """The formula of one entry's result, None where it is no elementwise operation of formulas and numbers."""
    args = [_leaf(value, known) for value in entry.args]
    name = entry.name.removesuffix("_")
    first = args[0] if args else None
    if first is None:
        return None
    # What moves elements about would show when the formula is checked by values.
    sizes = {log.tensors[slot].numel() for slot in (entry.reads[:1] + entry.results)}
    if entry.name in _CASTS or (entry.name in MOVES and len(sizes) == 1):
        return first
    plain = not entry.kwargs
    if name in _ARITHMETIC and plain and len(args) == 2 and args[1] is not None:
        return Formula(_ARITHMETIC[name], (first, args[1]))
    if name == "gelu":
        tanh = entry.kwargs.get("approximate", entry.args[1] if len(entry.args) > 1 else "none") == "tanh"
        return Formula("gelu_tanh" if tanh else "gelu", (first,))
    if name in ("pow", "square") and plain and (name == "square" or entry.args[1:] in ((2,), (2.0,))):
        return Formula("square", (first,))
    if name.startswith("clamp"):
        return _clamp(name, entry, first)
    if name in UNARY and plain and len(args) == 1:
        return Formula(name, (first,))
    return None


def _clamp(name: str, entry: Entry, first: Formula) -> Formula | None:
    """clamp(x, low, high), clamp_min(x, low), clamp_max(x, high) with numbers."""
    given: dict[str, Any] = {**dict(zip(("min", "max"), entry.args[1:], strict=False)), **entry.kwargs}
    if name == "clamp_max":
        given = {"max": given.get("min", given.get("max"))}
    for fn, key in (("max", "min"), ("min", "max")):
        bound = given.get(key)
        if bound is not None and (type(bound) not in (int, float) or not math.isfinite(bound)):
            return None
        first = first if bound is None else Formula(fn, (first, number(bound)))
    return first


def _leaf(value: Any, known: Mapping[int, Formula]) -> Formula | None:
    if isinstance(value, Ref):
        return known.get(value.slot)
    if type(value) in (int, float) and math.isfinite(value):
        return number(value)
    return None
