"""Do the routing weights act on the experts' input or on their results? Asked with weights of both signs.

For experts without biases whose activation is relu or nothing, w * f(x) = f(w * x) as long as no w is negative: both
readings fit every call that a softmax router makes, and differ for the first one that is made otherwise.

T tokens, K experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from moec.frontends.torch.body import Body
from moec.frontends.torch.expertchoice import slots_of
from moec.frontends.torch.instances import NotLifted

Ask = Callable[[torch.Tensor], torch.Tensor]
"""Weights -> the experts' result [T, N], all else as observed."""


def is_scaled_through(body: Body, params: Mapping[str, torch.Tensor], rows: torch.Tensor) -> bool:
    """Whether a factor above zero on the rows is one on the results, so that values alone do not tell the sides."""
    few = rows.reshape(-1, body.inputs)[:4].float()
    once, twice = body.expert(params, 0, few), body.expert(params, 0, 2 * few)
    return bool((twice - 2 * once).norm() <= 1e-5 * once.norm() * 2)


def on_input_by_sign(
    body: Body,
    params: Mapping[str, torch.Tensor],
    rows: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    ask: Ask,
) -> bool:
    """Which side the weights act on: rows [T, C], experts [T, K], weights [T, K] of an observed call.

    Raises NotLifted when the code cannot be asked, or its answer is neither reading's.
    """
    return _asked(body, params, rows, weights, lambda signed: (experts, signed), ask)


def chosen_on_input(
    body: Body,
    params: Mapping[str, torch.Tensor],
    rows: torch.Tensor,
    form: str,
    ids: torch.Tensor | None,
    weights: torch.Tensor,
    ask: Ask,
) -> bool:
    """The same where experts choose tokens: ids and weights as the call gives them in the form."""
    count, experts = rows.shape[0], body.experts
    return _asked(body, params, rows, weights, lambda signed: slots_of(form, ids, signed, count, experts), ask)


def _asked(
    body: Body,
    params: Mapping[str, torch.Tensor],
    rows: torch.Tensor,
    weights: torch.Tensor,
    routing: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    ask: Ask,
) -> bool:
    """`routing` gives experts [T, K] and weights [T, K] for weights of other signs."""
    signs = torch.ones_like(weights)
    signs.view(-1)[::2] = -1
    try:
        with torch.no_grad():
            theirs = ask(signs).float()
    except Exception as error:  # the user's code may refuse such weights in any way
        raise NotLifted(
            f"whether the weights act on the experts' input or on their results cannot be told: {error}"
        ) from error
    gaps = {}
    for on_input in (False, True):
        mine = body.evaluate(params, rows, *routing(weights * signs), on_input=on_input)
        gaps[on_input] = float((mine - theirs.reshape(mine.shape)).norm() / theirs.norm())
    best = min(gaps, key=lambda side: gaps[side])
    loose = 1e-4 if rows.dtype in (torch.float32, torch.float64) else 4e-2
    if gaps[best] > loose:
        raise NotLifted(
            "with weights below zero the experts are neither weighted at their input nor at their results: errors "
            f"{gaps[True]:.1e} and {gaps[False]:.1e}"
        )
    return best
