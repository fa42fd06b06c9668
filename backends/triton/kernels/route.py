"""From router logits to chosen experts and their weights in one launch, as `moec.backends.reference.routing` means it.

T tokens, E experts, K experts per token, G groups of experts.
"""

# mypy: disable-error-code="misc, no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from moec.backends.triton.kernels.activation import softplus
from moec.backends.triton.launch import Launch, current_stream
from moec.ir import Route

LEAST = tl.constexpr(-2147483648)


@triton.jit
def order_key(x):
    """x, f32 -> int32 in the same order; not-a-number above everything, both zeros alike."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x != x, 2147483647, key)  # noqa: PLR0124


@triton.jit
def take_largest(key, lane, WIDTH: tl.constexpr):
    """key[B, WIDTH] -> where each row's largest is, the lower one among equals: [B]."""
    both = (key.to(tl.int64) << 32) | (WIDTH - 1 - lane).to(tl.int64)[None, :]
    return WIDTH - 1 - (tl.max(both, axis=1) & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def scores(z, real, SCORE: tl.constexpr):
    """z[B, EB] -> [B, EB]."""
    if SCORE == "softmax":
        most = tl.max(tl.where(real, z, float("-inf")), axis=1)
        up = tl.where(real, tl.exp(z - most[:, None]), 0.0)
        s = up / tl.sum(up, axis=1)[:, None]
    elif SCORE == "sigmoid":
        s = 1.0 / (1.0 + tl.exp(-z))
    elif SCORE == "sqrt_softplus":
        s = tl.sqrt(softplus(z))
    else:
        s = z
    return s


@triton.jit
def keep_groups(c, key, lane, E: tl.constexpr, G: tl.constexpr, GB: tl.constexpr, KEPT: tl.constexpr,
                TOP2: tl.constexpr, EB: tl.constexpr, B: tl.constexpr):  # fmt: skip
    """c[B, EB] -> 1 for the experts of each row's KEPT best groups, int32[B, EB]."""
    SIZE: tl.constexpr = E // G
    g_lane = tl.arange(0, GB)
    worth = tl.full([B, GB], LEAST, dtype=tl.int32)
    for g in tl.static_range(0, G):
        inside = (lane // SIZE == g)[None, :]
        mine = tl.where(inside, key, LEAST)
        first = take_largest(mine, lane, EB)
        value = tl.sum(tl.where(lane[None, :] == first[:, None], c, 0.0), axis=1)
        if TOP2 and SIZE > 1:
            second = take_largest(tl.where(lane[None, :] == first[:, None], LEAST, mine), lane, EB)
            value += tl.sum(tl.where(lane[None, :] == second[:, None], c, 0.0), axis=1)
        worth = tl.where(g_lane[None, :] == g, order_key(value)[:, None], worth)
    kept = tl.zeros([B, EB], dtype=tl.int32)
    for _ in tl.static_range(0, KEPT):
        best = take_largest(worth, g_lane, GB)
        kept = tl.where((lane // SIZE)[None, :] == best[:, None], 1, kept)
        worth = tl.where(g_lane[None, :] == best[:, None], LEAST, worth)
    return kept


@triton.jit
def normalized(w, KIND: tl.constexpr, EPS: tl.constexpr, P: tl.constexpr):
    """w[B, KB], zeros beyond K -> [B, KB]."""
    if KIND == "sum":
        w = w / (tl.sum(w, axis=1) + EPS)[:, None]
    elif KIND == "clamped_sum":
        total = tl.sum(w, axis=1)
        w = w / tl.where(total < EPS, EPS, total)[:, None]
    elif KIND == "norm":
        size = tl.abs(w)
        if P == 1.0:
            total = tl.sum(size, axis=1)
        elif P == 2.0:
            total = tl.sqrt(tl.sum(size * size, axis=1))
        else:
            powers = tl.where(size == 0.0, 0.0, tl.exp2(P * tl.log2(size)))
            total = tl.exp2(tl.log2(tl.sum(powers, axis=1)) / P)
        w = w / total[:, None]
    return w


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["logits", "bias", "noise"])
def route_kernel(logits, bias, noise, weights, ids, tokens,
                 E: tl.constexpr, EB: tl.constexpr, K: tl.constexpr, KB: tl.constexpr, SCORE: tl.constexpr,
                 BIAS_ON: tl.constexpr, HAS_NOISE: tl.constexpr, G: tl.constexpr, GB: tl.constexpr,
                 KEPT: tl.constexpr, TOP2: tl.constexpr, FILL: tl.constexpr, NORMALIZE: tl.constexpr,
                 EPS: tl.constexpr, P: tl.constexpr, SCALE: tl.constexpr, B: tl.constexpr):  # fmt: skip
    """logits[T, E], bias[E]?, noise[T, E]? -> weights f32[T, K], ids i32[T, K]. Grid: T / B."""
    token = tl.program_id(0) * B + tl.arange(0, B)
    lane = tl.arange(0, EB)
    k_lane = tl.arange(0, KB)
    held = (token < tokens)[:, None]
    real = (lane < E)[None, :]
    at = token.to(tl.int64)[:, None] * E + lane[None, :]
    z = tl.load(logits + at, mask=held & real, other=0.0).to(tl.float32)
    if HAS_NOISE:
        z += tl.load(noise + at, mask=held & real, other=0.0).to(tl.float32)
    if BIAS_ON == "logits":
        z += tl.load(bias + lane, mask=lane < E, other=0.0).to(tl.float32)[None, :]
    s = scores(z, real, SCORE)
    c = s
    if BIAS_ON == "scores":
        c = s + tl.load(bias + lane, mask=lane < E, other=0.0).to(tl.float32)[None, :]
    key = tl.where(real, order_key(c), LEAST)
    if G > 1:
        kept = keep_groups(c, key, lane, E, G, GB, KEPT, TOP2, EB, B)
        key = tl.where(real & (kept == 0), order_key(tl.full([B, EB], FILL, dtype=tl.float32)), key)
    w = tl.zeros([B, KB], dtype=tl.float32)
    chosen = tl.zeros([B, KB], dtype=tl.int32)
    for k in tl.static_range(0, K):
        best = take_largest(key, lane, EB)
        found = tl.sum(tl.where(lane[None, :] == best[:, None], s, 0.0), axis=1)
        w = tl.where(k_lane[None, :] == k, found[:, None], w)
        chosen = tl.where(k_lane[None, :] == k, best[:, None], chosen)
        key = tl.where(lane[None, :] == best[:, None], LEAST, key)
    inside = (k_lane < K)[None, :]
    if SCORE == "softmax_chosen":
        most = tl.max(tl.where(inside, w, float("-inf")), axis=1)
        up = tl.where(inside, tl.exp(w - most[:, None]), 0.0)
        w = up / tl.sum(up, axis=1)[:, None]
    w = normalized(w, NORMALIZE, EPS, P) * SCALE
    at = token.to(tl.int64)[:, None] * K + k_lane[None, :]
    tl.store(weights + at, w, mask=held & inside)
    tl.store(ids + at, chosen, mask=held & inside)


class Router:
    """The launch of one route op for E experts on one device."""

    def __init__(self, op: Route) -> None:
        self.op = op
        self._made: dict[Any, tuple[Launch, int]] = {}

    def __call__(
        self, logits: torch.Tensor, bias: torch.Tensor | None = None, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """logits[T, E], bias[E]?, noise[T, E]? -> weights f32[T, K], ids i32[T, K], on the current stream."""
        tokens, experts = logits.shape
        weights = torch.empty(tokens, self.op.k, dtype=torch.float32, device=logits.device)
        ids = torch.empty(tokens, self.op.k, dtype=torch.int32, device=logits.device)
        if tokens == 0:
            return weights, ids
        given = [None if x is None else x.contiguous() for x in (logits, bias, noise)]
        key = (experts, *(None if x is None else x.dtype for x in given))
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = self._make(experts, bias is not None, noise is not None)
        launch, rows = made
        launch(current_stream(logits.device), (-(-tokens // rows), 1, 1), *given, weights, ids, tokens)
        return weights, ids

    def _make(self, experts: int, has_bias: bool, has_noise: bool) -> tuple[Launch, int]:
        op = self.op
        lanes = triton.next_power_of_2(experts)
        rows = max(1, min(16, 1024 // lanes))
        constants = {
            "E": experts,
            "EB": lanes,
            "K": op.k,
            "KB": triton.next_power_of_2(op.k),
            "SCORE": op.score,
            "BIAS_ON": op.bias_on if has_bias else "nothing",
            "HAS_NOISE": has_noise,
            "G": op.groups,
            "GB": triton.next_power_of_2(op.groups),
            "KEPT": op.kept_groups,
            "TOP2": op.group_score == "top2",
            "FILL": float("-inf") if op.group_fill == "minus_inf" else 0.0,
            "NORMALIZE": op.normalize,
            "EPS": float(op.eps),
            "P": float(op.p),
            "SCALE": float(op.scale),
            "B": rows,
        }
        return Launch(route_kernel, constants, warps=4, stages=1), rows
