"""Expert ids outside of 0..E-1: some code takes them for "no expert", other code raises or counts from the end.

T tokens, K experts per token, E experts, D width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from moec.frontends.torch.binding import Binder
from moec.frontends.torch.body import Body
from moec.frontends.torch.bounds import Bounded
from moec.frontends.torch.direct import MOST_IDENTITIES, near
from moec.frontends.torch.observe import tokens
from moec.frontends.torch.probing import Maker, routing, shape_for
from moec.frontends.torch.routing import Unusual

DEBUG = os.environ.get("MOEC_DEBUG", "0").lower() not in ("", "0", "false", "off", "no")
"""Whether ids are looked at on every device, which waits for them."""
_FEW = 64


@dataclass(frozen=True)
class Ids:
    """The lowest and the highest id that a layer was seen to understand."""

    lowest: int
    highest: int

    def check(self, ids: torch.Tensor) -> None:
        """Raise Unusual for others. On devices other than the CPU a look would wait for the ids: only with DEBUG."""
        if ids.device.type != "cpu" and not (DEBUG and _may_wait(ids)):
            return
        low, high = _ends(ids)
        if low < self.lowest or high > self.highest:
            found = high if high > self.highest else low
            raise Unusual(f"expert id {found} is not in {self.lowest}..{self.highest}, the ids that were verified")

    @classmethod
    def seen(cls, ids: torch.Tensor | None, experts: int) -> Ids:
        """From the ids of an observed call."""
        if ids is None:
            return cls(0, experts - 1)
        return cls(-1 if bool((ids == -1).any()) else 0, experts if bool((ids == experts).any()) else experts - 1)


def _may_wait(ids: torch.Tensor) -> bool:
    """Whether the host may wait for the ids: not while a CUDA graph is being captured."""
    return ids.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _ends(ids: torch.Tensor) -> tuple[int, int]:
    """The lowest and the highest; of few, Python says it sooner."""
    if 0 < ids.numel() <= _FEW:
        found = ids.reshape(-1).tolist()
        return min(found), max(found)
    low, high = torch.aminmax(ids)
    return int(low), int(high)


def understood(method: Callable[..., Any], maker: Maker, params: Mapping[str, torch.Tensor]) -> tuple[Ids, int]:
    """The ids that the method takes, and how many of those from E on are experts that return their input.

    -1 and the first id that stands for nothing are taken where it was tried that a slot that has them is left out.
    """
    body, roles = maker.body, maker.roles
    template = maker.template[roles.x]
    if roles.form not in ("indices", "unit") or template.device.type not in ("cpu", "cuda"):
        return Ids(0, body.choices - 1), body.identities

    def answers(stray: int, identities: int) -> bool:
        return _answers(method, maker, params, replace(body, identities=identities), stray)

    identities = 0
    if body.inputs == body.outputs:
        while identities < MOST_IDENTITIES and answers(body.experts + identities, identities + 1):
            identities += 1
    lowest = -1 if answers(-1, identities) else 0
    beyond = body.experts + identities
    return Ids(lowest, beyond if answers(beyond, identities) else beyond - 1), identities


def _answers(
    method: Callable[..., Any], maker: Maker, params: Mapping[str, torch.Tensor], body: Body, stray: int
) -> bool:
    """Whether the method computes what `body` does for tokens of which some choose the id `stray`."""
    roles, template = maker.roles, maker.template[maker.roles.x]
    x = tokens(shape_for(template.dim(), 6, body.inputs), template.dtype, 5, device=template.device, mixed=False)
    rows = x.reshape(-1, body.inputs)
    weights = torch.ones(len(rows), roles.slots) if roles.form == "unit" else torch.rand(len(rows), roles.slots) + 0.1
    chosen = routing(len(rows), roles.slots, body.experts, 0, "round robin")
    chosen[:: 3 if roles.spread else 2, 0] = stray
    made = maker(x, chosen.to(x.device), weights.to(x.device))
    args, kwargs = Binder(method).unbind(made)
    loose = 1e-4 if template.dtype in (torch.float32, torch.float64) else 4e-2
    try:
        with torch.no_grad(), Bounded():  # type: ignore[no-untyped-call]
            want = body.evaluate(params, rows, *maker.effective(made), on_input=roles.on_input)
            got = method(*args, **kwargs).reshape(want.shape).float()
    except Exception:  # the user's code may refuse such an id in any way
        return False
    # A token that lost its only expert is zero in both.
    asked = want.norm(dim=-1) > 0
    return bool((got[~asked] == 0).all()) and near(got[asked], want[asked], loose)
