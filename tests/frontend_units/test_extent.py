"""Which views of one storage may share a byte: exact where views are interleaved evenly, never wrong about overlap."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from moec.frontends.torch.extent import Extent

BASE = torch.arange(8 * 6 * 4)


def views() -> dict[str, Tensor]:
    blocks = BASE.view(6, 8, 4)
    return {
        "all": BASE,
        "row 0": blocks[0],
        "row 5": blocks[5],
        "middle 1": blocks[:, 1],
        "middle 2": blocks[:, 2],
        "column 0": blocks[..., 0],
        "column 3": blocks[..., 3],
        "transposed": blocks.permute(2, 0, 1)[1],
        "one": BASE[17],
        "none": BASE[4:4],
        "expanded": blocks[2, 3].expand(5, 4),
        "even": BASE[::2],
        "odd": BASE[1::2],
        "as bytes": BASE[:3].view(torch.uint8)[4:12],
    }


def touched(view: Tensor) -> set[int]:
    """The bytes of the storage that a view's elements are in."""
    width = view.element_size()
    at = [
        int(view.storage_offset()) + sum(i * s for i, s in zip(place, view.stride(), strict=True))
        for place in itertools.product(*(range(n) for n in view.shape))
    ]
    return {start * width + byte for start in at for byte in range(width)}


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations_with_replacement(views(), 2)))
def test_what_shares_a_byte_meets(first: str, second: str) -> None:
    a, b = views()[first], views()[second]
    meets = Extent.of(a).meets(Extent.of(b))
    assert meets == Extent.of(b).meets(Extent.of(a))
    if touched(a) & touched(b):
        assert meets


@pytest.mark.parametrize(
    ("first", "second"),
    [("middle 1", "middle 2"), ("column 0", "column 3"), ("even", "odd"), ("row 0", "row 5"), ("none", "all")],
)
def test_interleaved_views_are_told_apart(first: str, second: str) -> None:
    assert not Extent.of(views()[first]).meets(Extent.of(views()[second]))
