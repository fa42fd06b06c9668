"""Rows by their places: which shapes may be experts' results, and that rows go there and back in order.

E experts, D inputs, N outputs.
"""

from __future__ import annotations

import pytest
import torch

from moec.frontends.torch.places import Places, placements, predicted, theirs

E, D, N = 3, 4, 5


def expert(index: int, rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows * (index + 1), rows[:, :1] - index], -1)


@pytest.mark.parametrize("x_axis", [0, 1, None])
@pytest.mark.parametrize("y_axis", [0, 1, 2])
def test_rows_go_there_and_back(x_axis: int | None, y_axis: int) -> None:
    places = Places(x_axis, y_axis)
    x = torch.randn((7, D) if x_axis is None else [(E, 7, D), (7, E, D)][x_axis])
    parts = [x if x_axis is None else x.select(x_axis, e) for e in range(E)]
    want = torch.stack([expert(e, part) for e, part in enumerate(parts)], y_axis)
    rows = predicted(expert, places, x, E)
    assert places.shape(x.shape, E, N) == want.shape
    assert torch.equal(places.back(rows, want.shape), want)
    assert torch.equal(theirs(places, want, N), rows)
    assert torch.equal(places.rows(x, E), torch.cat(parts))


def test_placements_are_those_whose_shapes_fit() -> None:
    x = torch.randn(E, 7, D)
    assert list(placements(x, (E, 7, N), E, D, N)) == [Places(0, 0)]
    assert list(placements(x, (7, E, N), E, D, N)) == [Places(0, 1)]
    assert list(placements(x, (E, 7, E, N), E, D, N)) == [Places(None, 2)]
    assert Places(None, 0) in placements(torch.randn(E, 7, D), (E, E, 7, N), E, D, N)
    assert list(placements(x, (E, 8, N), E, D, N)) == []
    assert list(placements(x, (E, 7, N), E, D + 1, N)) == []
    assert list(placements(torch.randn(D), (E, N), E, D, N)) == []
