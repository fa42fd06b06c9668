"""Grouping, both products over tiles, and the sum over each token's experts.

T tokens, K experts per token, P = T * K pairs, E experts, D model width, F expert width, O output width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moec.backends.triton.arranging import arranging, summing
from moec.backends.triton.choose import PERSISTENT, Plan, Tile
from moec.backends.triton.kernels import group
from moec.backends.triton.launch import AllReady, address, current_stream
from moec.backends.triton.products import persistent_products, tile_products
from moec.backends.triton.scratch import Buffer, Scratch
from moec.backends.triton.site import Site

Step = Callable[..., None]
"""Launches of one part of a call: the stream first, then tensors, or addresses once all is compiled."""


META, COUNTS, H, Y = range(4)
"""The buffers of a call by their place in its scratch memory."""


@dataclass(frozen=True, slots=True)
class GroupedRun:
    """The steps of a call and the buffers between them."""

    arrange: Step
    """stream, ids, valid, meta, counts: fills meta."""
    first: Step
    """stream, x, meta, h: fills h[P, F]."""
    second: Step
    """stream, h, meta, weights, y: fills y[P, O]."""
    last: Step
    """stream, y, ids, valid, out: fills out[T, O]."""
    scratch: Scratch
    """meta, counts, h, y."""
    straight: bool
    """Whether the second product writes the result itself: each token has one expert."""
    described: bool
    """Whether h goes by a descriptor, which is made of a tensor."""
    ready: AllReady

    def __call__(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor | None,
        valid: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        memory = self.scratch.allocate(x.device)
        stream = current_stream(x.device)
        if self.ready:
            at = x.data_ptr(), ids.data_ptr(), address(weights), address(valid), out.data_ptr()
            buffers: list[Any] = self.scratch.addresses(memory)
            if self.described:
                buffers[H] = self.scratch.view(memory, H)
            self._launch(stream, *at, *buffers)
        else:
            self._launch(stream, x, ids, weights, valid, out, *(self.scratch.view(memory, i) for i in range(4)))

    def _launch(
        self, stream: int, x: Any, ids: Any, weights: Any, valid: Any, out: Any, meta: Any, counts: Any, h: Any, y: Any
    ) -> None:
        if self.straight:
            y = out
        self.arrange(stream, ids, valid, meta, counts)
        self.first(stream, x, meta, h)
        self.second(stream, h, meta, weights, y)
        self.last(stream, y, ids, valid, out)


def grouped_run(site: Site, plan: Plan, tokens: int) -> GroupedRun:
    """The launches of a plan of tiles for so many tokens."""
    layer, k = site.layer, site.k
    one, two = plan.first, plan.second
    assert isinstance(one, Tile)
    assert isinstance(two, Tile)
    assert one.bm == two.bm, "both products go through the same tiles"
    persistent = plan.path == PERSISTENT
    # A descriptor that a kernel makes for each tile stands between the loops over tiles and steps.
    one = one._replace(flatten=one.flatten and not layer.gate.w.listed)
    two = two._replace(flatten=two.flatten and not layer.down.w.listed)
    pairs, straight = tokens * k, k == 1
    most = group.max_tiles(pairs, layer.experts, one.bm)
    at = group.at_tiles(layer.experts)
    products = persistent_products if persistent else tile_products
    (first, second), launches = products(site, one, two, most, at)
    arrange, counts, made = arranging(site, tokens, one.bm, most)
    last, launch = summing(site, tokens)
    scratch = Scratch(
        Buffer((at + 2 * most + pairs,), torch.int32),
        Buffer((counts,), torch.int32),
        Buffer((pairs, layer.f), layer.dtype),
        Buffer((0, 0) if straight else (pairs, layer.o), layer.dtype),
    )
    ready = AllReady((*made, *launches, launch))
    return GroupedRun(arrange, first, second, last, scratch, straight, persistent, ready)
