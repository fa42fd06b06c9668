"""From router logits to chosen experts. T tokens, E experts, K experts per token, C places of an expert."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moec.backends.reference.activations import softplus
from moec.ir import Route


def score(logits: torch.Tensor, kind: str) -> torch.Tensor:
    """logits[T, E] -> [T, E]; softmax over the experts of a token, softmax_tokens over the tokens of an expert."""
    if kind == "softmax":
        return logits.softmax(1)
    if kind == "softmax_tokens":
        return logits.softmax(0)
    if kind == "sigmoid":
        return logits.sigmoid()
    if kind == "sqrt_softplus":
        return softplus(logits).sqrt()
    assert kind in ("identity", "softmax_chosen"), kind
    return logits


def route(
    op: Route, logits: torch.Tensor, bias: torch.Tensor | None, noise: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits[T, E], bias[E]?, noise[T, E]? -> weights f32[T, K], experts i32[T, K]."""
    z = logits.float()
    if noise is not None:
        z = z + noise.float()
    if bias is not None and op.bias_on == "logits":
        z = z + bias.float()
    s = score(z, op.score)
    chosen_by = s + bias.float() if bias is not None and op.bias_on == "scores" else s
    if op.groups > 1:
        chosen_by = _keep_groups(op, chosen_by)
    experts = largest(chosen_by, op.k)
    weights = s.gather(1, experts)
    if op.score == "softmax_chosen":
        weights = weights.softmax(1)
    return _normalize(op, weights) * op.scale, experts.int()


def largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """[T, E] -> indices [T, count] of the largest of each row, largest first, among equals the lower one first."""
    return values.sort(dim=1, descending=True, stable=True).indices[:, :count]


def _keep_groups(op: Route, chosen_by: torch.Tensor) -> torch.Tensor:
    """[T, E] with the experts of all but the best groups set to -inf or 0."""
    parts = chosen_by.reshape(len(chosen_by), op.groups, chosen_by.shape[1] // op.groups)
    counted = 1 if op.group_score == "max" else 2
    worth = parts.sort(dim=2, descending=True).values[:, :, :counted].sum(2)
    kept = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, largest(worth, op.kept_groups), True)
    fill = float("-inf") if op.group_fill == "minus_inf" else 0.0
    return parts.masked_fill(~kept.unsqueeze(2), fill).flatten(1)


def _normalize(op: Route, weights: torch.Tensor) -> torch.Tensor:
    if op.normalize == "sum":
        return weights / (weights.sum(1, keepdim=True) + op.eps)
    if op.normalize == "clamped_sum":
        return weights / weights.sum(1, keepdim=True).clamp(min=op.eps)
    if op.normalize == "norm":
        return weights / weights.abs().pow(op.p).sum(1, keepdim=True).pow(1 / op.p)
    assert op.normalize == "none", op.normalize
    return weights


def route_experts(logits: torch.Tensor, capacity: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """logits[T, E] -> weights f32[E, C], tokens i32[E, C]: each expert's largest; places left over are 0 and -1."""
    s = score(logits.float(), kind).T
    tokens = largest(s, capacity)
    missing = capacity - tokens.shape[1]
    weights = F.pad(s.gather(1, tokens), (0, missing))
    return weights, F.pad(tokens.int(), (0, missing), value=-1)
