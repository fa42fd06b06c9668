"""Solving y[e] = f_e(x[e]) for x and y among the tensors of a block's log: experts that take rows by their places.

E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from moec.frontends.torch.body import Body
from moec.frontends.torch.direct import near
from moec.frontends.torch.items import Blocks
from moec.frontends.torch.oplog import slots
from moec.frontends.torch.places import placements, predicted, theirs
from moec.frontends.torch.solve import Nearest, Solution, is_precise


def solve_placed(
    blocks: Blocks, body: Body, params: Mapping[str, torch.Tensor], nearest: Nearest | None = None
) -> Solution | None:
    """The solution for experts that take their rows by position, None when no tensors of the log fit.

    What filled the rows, and what becomes of the results, are the block's own operations.
    """
    loose = 1e-4 if is_precise(params, body) else 4e-2
    made = [slot for item in blocks.prefix for slot in item.results]
    ends = [
        (slot, index, value)
        for index in range(blocks.last, blocks.site.end)
        for slot in dict.fromkeys((*blocks.log.entries[index].results, *blocks.log.entries[index].writes))
        if (value := blocks.log.value(slot, index + 1)) is not None and value.is_floating_point() and value.numel()
    ]
    for x_slot in dict.fromkeys([*reversed(made), *slots((blocks.site.args, blocks.site.kwargs))]):
        x = blocks.log.value(x_slot, blocks.first)
        if x is None or not x.is_floating_point() or not x.numel() or blocks.log.param_of(x_slot) is not None:
            continue
        known: dict[int | None, torch.Tensor] = {}
        for slot, index, y in ends:
            for places in placements(x, y.shape, body.experts, body.inputs, body.outputs):
                if places.x_axis not in known:
                    known[places.x_axis] = predicted(partial(body.expert, params), places, x, body.experts)
                if near(known[places.x_axis], theirs(places, y, body.outputs), loose):
                    return Solution(x_slot, None, None, "places", 1, slot, index, False, (), places)
    return None
