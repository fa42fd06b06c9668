"""From recorded values to the layer that gives them: which value is x, which the weights, and what the experts compute.

T tokens, K experts per token, D model width, F expert width. Every hypothesis is tried on numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F

from moec.frontends.onnx.banks import Body, Found, bodies, shape_of
from moec.frontends.onnx.layer import Form
from moec.frontends.onnx.store import Bank, FileWeights
from moec.ir import Builder, DenseFfn, ExpertFfn, Region, Tensor, Value, Weight

FUNCTIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu2": lambda x: F.relu(x).square(),
    "identity": lambda x: x,
}
LAYOUTS = ("concat", "concat_up_first", "interleaved", "interleaved_up_first")
LOOSE = 1e-4
# Tokens that hypotheses are tried on first.
FEW = 6
LOW = {"float16": 5e-3, "bfloat16": 4e-2}


@dataclass(frozen=True)
class Activation:
    """As in the IR."""

    fn: str
    layout: str
    alpha: float = 1.0
    limit: float | None = None
    up_shift: float = 0.0


def in_words(at: Activation) -> str:
    """For a report."""
    return f"{at.fn}, {at.layout}" + (f", clamped at {at.limit:g}" if at.limit else "")


@dataclass(frozen=True)
class Solution:
    """The values by name, and what is between them."""

    x: str
    weights: str | None
    """None: every weight is 1."""
    y: str
    body: Body
    activation: Activation


@dataclass(frozen=True)
class Recorded:
    """Values of one run: ids[T, K], and candidates by name for x[T, D], weights[T, K] and y[T, D]."""

    ids: torch.Tensor
    xs: Mapping[str, torch.Tensor]
    weights: Mapping[str, torch.Tensor]
    ys: Mapping[str, torch.Tensor]
    forms: Mapping[str, Form] = field(default_factory=dict)
    """How each of the weights holds them."""
    bar: float = LOOSE


def solve(recorded: Recorded, found: Found) -> Solution | None:
    """The first hypothesis under which the recorded values fit. A few tokens rule most of them out."""
    tokens = len(recorded.ids)
    few = _taken(recorded, torch.linspace(0, tokens - 1, min(tokens, FEW)).long())
    for x_name, x in recorded.xs.items():
        for body in bodies(found, x.shape[-1]):
            # Widths decide before numbers do.
            ys = {name: y for name, y in few.ys.items() if y.shape[1] == shape_of(body.w_out)[0]}
            if not ys:
                continue
            some = _hidden(few, x_name, body)
            whole = None
            for activation in activations(body, found):
                rows = project(activated(*some, activation), few.ids, body.w_out, body.b_out)
                for w_name, y_name in _matches(rows, few.weights, ys, recorded.bar):
                    whole = whole or _hidden(recorded, x_name, body)
                    rows = project(activated(*whole, activation), recorded.ids, body.w_out, body.b_out)
                    w = torch.ones(recorded.ids.shape) if w_name is None else recorded.weights[w_name]
                    if near((rows * w.unsqueeze(-1)).sum(1), recorded.ys[y_name], recorded.bar):
                        # gate and up may be told apart only by which of them is activated.
                        return Solution(x_name, w_name, y_name, _named(body, activation), _settled(activation))
    return None


def _taken(recorded: Recorded, at: torch.Tensor) -> Recorded:
    """The same values of these tokens alone."""
    xs, weights, ys = (
        {name: one[at] for name, one in group.items()} for group in (recorded.xs, recorded.weights, recorded.ys)
    )
    return Recorded(recorded.ids[at], xs, weights, ys, bar=recorded.bar)


def _hidden(recorded: Recorded, x_name: str, body: Body) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What goes into the activation: [T, K, F or 2F], and up where it has weights of its own."""
    x = recorded.xs[x_name]
    up = None if body.w_up is None else project(x, recorded.ids, body.w_up, body.b_up)
    return project(x, recorded.ids, body.w_in, body.b_in), up


def _matches(
    rows: torch.Tensor, weights: Mapping[str, torch.Tensor], ys: Mapping[str, torch.Tensor], bar: float
) -> list[tuple[str | None, str]]:
    """Pairs of weights and results that fit rows[T, K, D], in order."""
    names: list[str | None] = [*weights, None]
    told = torch.stack([*weights.values(), torch.ones(rows.shape[:2])])
    mine = torch.einsum("wtk,tkd->wtd", told, rows)
    theirs = torch.stack(list(ys.values()))
    gap = (mine.unsqueeze(1) - theirs.unsqueeze(0)).norm(dim=-1)
    fits = (gap <= 4 * bar * theirs.norm(dim=-1) + 1e-12).all(-1)
    titles = list(ys)
    return [(names[w], titles[y]) for w, y in fits.nonzero().tolist()]


def _named(body: Body, activation: Activation) -> Body:
    if activation.layout != "pair_up_first":
        return body
    assert body.w_up is not None
    return replace(body, w_in=body.w_up, w_up=body.w_in, b_in=body.b_up, b_up=body.b_in)


def _settled(activation: Activation) -> Activation:
    return replace(activation, layout="pair") if activation.layout == "pair_up_first" else activation


def activations(body: Body, found: Found) -> Iterator[Activation]:
    """What the activation may be; clamps, slopes and shifts only with numbers that stand in the graph."""
    rows, hidden = shape_of(body.w_in)[0], shape_of(body.w_out)[1]
    layouts: Sequence[str] = ("pair", "pair_up_first") if body.w_up is not None else LAYOUTS
    if body.w_up is None and rows == hidden:
        layouts = ("none",)
    limits = sorted({abs(number) for number in found.limits if abs(number) > 0.01})
    slopes = [1.0, *sorted({number for number in found.scalars if 1 < number < 8})]
    shifts = [0.0, 1.0] if 1.0 in found.scalars else [0.0]
    for limit in (*limits, None):
        for shift in shifts if layouts != ("none",) else [0.0]:
            for layout in layouts:
                yield from (Activation(fn, layout, 1.0, limit, shift) for fn in FUNCTIONS)
                yield from (Activation("silu", layout, slope, limit, shift) for slope in slopes[1:])


def project(x: torch.Tensor, ids: torch.Tensor, bank: Bank, bias: Bank | None) -> torch.Tensor:
    """x[T, C] or [T, K, C] -> [T, K, N]: each slot by its expert's matrix."""
    rows = x.unsqueeze(1).expand(-1, ids.shape[1], -1) if x.dim() == 2 else x
    result = torch.zeros(*ids.shape, shape_of(bank)[0])
    for e in ids.unique().tolist():
        if 0 <= e < len(bank):
            at = ids == e
            result[at] = F.linear(rows[at], bank[e].float(), None if bias is None else bias[e].float())
    return result


def activated(h: torch.Tensor, up: torch.Tensor | None, at: Activation) -> torch.Tensor:
    """[..., F or 2F] -> [..., F]."""
    gate: torch.Tensor = h
    if up is None and at.layout != "none":
        parts = (h[..., 0::2], h[..., 1::2]) if at.layout.startswith("inter") else h.chunk(2, -1)
        gate, up = parts[::-1] if at.layout.endswith("up_first") else parts
    elif up is not None and at.layout == "pair_up_first":
        gate, up = up, gate
    if at.limit is not None:
        gate = gate.clamp(max=at.limit)
        up = None if up is None else up.clamp(-at.limit, at.limit)
    a = gate * torch.sigmoid(at.alpha * gate) if at.alpha != 1 else FUNCTIONS[at.fn](gate)
    return a if up is None else a * (up + at.up_shift)


def loose(arrays: Iterable[Any]) -> float:
    """How near values of these types can be."""
    return max((LOW.get(str(array.dtype), LOOSE) for array in arrays), default=LOOSE)


def near(mine: torch.Tensor, theirs: torch.Tensor, bar: float = LOOSE) -> bool:
    """Each row within the bar; zeros are no evidence."""
    if mine.shape != theirs.shape or not bool(torch.isfinite(mine).all()):
        return False
    norm, gap = theirs.norm(dim=-1), (mine - theirs).norm(dim=-1)
    return bool((norm > 0).any() and (gap <= bar * norm + 1e-12).all())


def lift(
    name: str, solution: Solution, k: int, dtype: str = "f32", weights_dtype: str = "f32"
) -> tuple[Region, FileWeights]:
    """The layer in the IR: x[T, D], experts i32[T, K], weights[T, K] -> [T, D]; k=0 means a dense one, of x alone."""
    body, at = solution.body, solution.activation
    banks = {role: bank for role, bank in vars(body).items() if bank is not None}
    b = Builder(name)
    x = b.input("x", Tensor.of(dtype, "T", shape_of(body.w_in)[1]))
    routing = []
    if k:
        routing = [b.input("experts", Tensor.of("i32", "T", k)), b.input("weights", Tensor.of(weights_dtype, "T", k))]
    refs: dict[str, Value] = {}
    for role, bank in banks.items():
        sizes = (len(bank), *shape_of(bank)) if k else shape_of(bank)
        refs[role] = b.add(Weight(ref=role, type=Tensor.of(dtype, *sizes)), role)
    more: dict[str, Any] = {role: value for role, value in refs.items() if role not in ("w_in", "w_out")}
    more |= {"fn": at.fn, "layout": at.layout, "alpha": at.alpha, "limit": at.limit, "up_shift": at.up_shift}
    if k:
        y = b.add(ExpertFfn(x, routing[0], routing[1], refs["w_in"], refs["w_out"], **more), "y")
    else:
        y = b.add(DenseFfn(x, refs["w_in"], refs["w_out"], **more), "y")
    held = banks if k else {role: bank[0] for role, bank in banks.items()}
    return b.build(y), FileWeights(held, dtype)
