"""Regions over weights that lie in every way, and what to call them with.

T tokens, K choices, E experts, D model width, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moec.backendbase import Executable
from moec.weights import View
from tests.backends.running import Weights
from tests.backends.shapes import some

E, D, F = 4, 6, 5
UNFUSED = """\
region moe(%x: f32[T, 6], %experts: i32[T, 2], %weights: f32[T, 2]) {
  %order, %offsets = group(%experts) {experts=4}
  %rows = gather(%x, %order) {k=2}
  %w_gate = weight {ref="gate"} : f32[4, 5, 6]
  %w_up = weight {ref="up"} : f32[4, 5, 6]
  %g = grouped_linear(%rows, %offsets, %w_gate)
  %u = grouped_linear(%rows, %offsets, %w_up)
  %a = glu(%g, %u) {fn="silu"}
  %w_down = weight {ref="down"} : f32[4, 6, 5]
  %rows_2 = grouped_linear(%a, %offsets, %w_down)
  %y = combine(%rows_2, %order, %weights)
  return %y
}"""
JOINED = """\
region moe(%x: f32[T, 6], %experts: i32[T, 2], %weights: f32[T, 2]) {
  %w_gate = weight {ref="gate"} : f32[4, 5, 6]
  %w_up = weight {ref="up"} : f32[4, 5, 6]
  %w_in = concat_weights(%w_gate, %w_up) {axis=1}
  %w_down = weight {ref="down"} : f32[4, 6, 5]
  %y = expert_ffn(%x, %experts, %weights, %w_in, %w_down) {fn="silu", layout="concat"}
  return %y
}"""
JOINED_UNFUSED = """\
region moe(%x: f32[T, 6], %experts: i32[T, 2], %weights: f32[T, 2]) {
  %order, %offsets = group(%experts) {experts=4}
  %rows = gather(%x, %order) {k=2}
  %w_gate = weight {ref="gate"} : f32[4, 5, 6]
  %w_up = weight {ref="up"} : f32[4, 5, 6]
  %w_in = concat_weights(%w_gate, %w_up) {axis=1}
  %h = grouped_linear(%rows, %offsets, %w_in)
  %a = glu(%h) {fn="silu", layout="concat"}
  %w_down = weight {ref="down"} : f32[4, 6, 5]
  %rows_2 = grouped_linear(%a, %offsets, %w_down)
  %y = combine(%rows_2, %order, %weights)
  return %y
}"""
PLACED = """\
region moe(%x: f32[T, 6], %experts: i32[T, 2], %weights: f32[T, 2]) {
  %order, %offsets = group(%experts) {experts=4}
  %rows = gather(%x, %order) {k=2}
  %there, %bounds = exchange(%rows, %offsets) {owners=[1, 0, 1, 0], devices=2}
  %w_gate = weight {ref="gate"} : f32[4, 5, 6]
  %w_up = weight {ref="up"} : f32[4, 5, 6]
  %gate_there = select_experts(%w_gate) {experts=[1, 3, 0, 2]}
  %up_there = select_experts(%w_up) {experts=[1, 3, 0, 2]}
  %g = grouped_linear(%there, %bounds, %gate_there)
  %u = grouped_linear(%there, %bounds, %up_there)
  %a = glu(%g, %u) {fn="silu"}
  %w_down = weight {ref="down"} : f32[4, 6, 5]
  %down_there = select_experts(%w_down) {experts=[1, 3, 0, 2]}
  %rows_2 = grouped_linear(%a, %bounds, %down_there)
  %home, %bounds_home = exchange(%rows_2, %bounds) {owners=[1, 0, 1, 0], devices=2, back=true}
  %y = combine(%home, %order, %weights)
  return %y
}"""
QUANTIZED = """\
region moe(%x: f32[T, 6], %experts: i32[T, 2], %weights: f32[T, 2]) {
  %w_gate = weight {ref="gate"} : f32[4, 5, 6]
  %w_up = weight {ref="up"} : f32[4, 5, 6]
  %w_in = concat_weights(%w_gate, %w_up) {axis=1}
  %q_in, %s_in = quantize_weight(%w_in)
  %w_down = weight {ref="down"} : f32[4, 6, 5]
  %q_out, %s_out = quantize_weight(%w_down)
  %y = expert_ffn(%x, %experts, %weights, %q_in, %q_out, scale_in=%s_in, scale_out=%s_out) {fn="silu", layout="concat"}
  return %y
}"""
REGIONS = {
    "unfused": UNFUSED,
    "joined": JOINED,
    "joined-unfused": JOINED_UNFUSED,
    "placed": PLACED,
    "quantized": QUANTIZED,
}


def _flat(weights: Weights, ref: str, w: torch.Tensor) -> None:
    """All experts in one parameter [E*N, C] behind some other rows."""
    experts, rows, columns = w.shape
    weights.dense(ref, torch.cat([torch.zeros(3, columns, dtype=w.dtype), w.flatten(0, 1)]))
    views = (View(ref, (3 + e * rows) * columns, (rows, columns), (columns, 1)) for e in range(experts))
    weights.views[ref] = tuple(views)


def _interleaved(weights: Weights, ref: str, w: torch.Tensor) -> None:
    """Every other row of one parameter, the experts in reverse."""
    experts, rows, columns = w.shape
    larger = torch.full((experts, 2 * rows, columns), float("nan"), dtype=w.dtype)
    larger[:, ::2] = w.flip(0)
    weights.dense(ref, larger)
    step = 2 * rows * columns
    views = (View(ref, (experts - 1 - e) * step, (rows, columns), (2 * columns, 1)) for e in range(experts))
    weights.views[ref] = tuple(views)


Entry = Callable[[Weights, str, torch.Tensor], object]
LAYOUTS: dict[str, Entry] = {
    "stacked": lambda weights, ref, w: weights.stacked(ref, w),
    "transposed": lambda weights, ref, w: weights.stacked(ref, w.transpose(1, 2).contiguous().transpose(1, 2)),
    "separate": lambda weights, ref, w: weights.separate(ref, w),
    "separate-transposed": lambda weights, ref, w: weights.separate(
        ref, w.transpose(1, 2).contiguous().transpose(1, 2)
    ),
    "flat": _flat,
    "interleaved": _interleaved,
}
each_region = pytest.mark.parametrize("text", REGIONS.values(), ids=REGIONS)
each_pack = pytest.mark.parametrize("pack", [False, True])


def layer(put: Entry = LAYOUTS["stacked"]) -> Weights:
    """gate, up and down of E experts."""
    torch.manual_seed(11)
    weights = Weights()
    for ref, shape in (("gate", (E, F, D)), ("up", (E, F, D)), ("down", (E, D, F))):
        put(weights, ref, some(*shape))
    return weights


def inputs(tokens: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, experts and weights of a call; expert 3 has no token."""
    torch.manual_seed(12)
    return some(tokens, D), torch.randint(0, 3, (tokens, 2), dtype=torch.int32), some(tokens, 2)


def run(executable: Executable, at: tuple[torch.Tensor, ...] | None = None) -> torch.Tensor:
    """The one output."""
    (y,) = executable(*(at or inputs()))
    return y


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to the order of sums."""
    return bool((a - b).norm() <= 2e-6 * b.norm())
