"""The choice of path and tiles: a function of shape, tokens and GPU that stays within shared memory."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from moec.backends.triton.choose import GEMV, PERSISTENT, TILES, Rows, Shape, Tile, choose, expected_hit
from moec.backends.triton.gpu import GpuFacts
from moec.backends.triton.shipped import measured
from tests.backends.triton.kernels.ahead import GPUS

BF16 = torch.bfloat16


def shape(experts: int = 8, d: int = 4096, f: int = 14336, *, gated: bool = True, dtype: torch.dtype = BF16) -> Shape:
    return Shape(experts, d, f, d, gated, dtype, dtype, (False, False), tma=True)


def test_paths_follow_how_many_rows_share_an_expert() -> None:
    h100 = GPUS[90]
    assert [choose(shape(), t, 2, h100).path for t in (1, 8, 64, 512)] == [GEMV, TILES, TILES, PERSISTENT]
    assert choose(shape(256, 7168, 2048), 512, 8, h100).path == TILES
    assert choose(shape(64, 768, 3072, gated=False), 8, 1, h100).path == GEMV


def test_older_gpus_and_fp32_get_plain_loads() -> None:
    assert {choose(shape(), t, 2, GPUS[gpu]).path for gpu in (80, 89) for t in (8, 64, 512, 16384)} == {TILES}
    assert choose(shape(dtype=torch.float32), 4096, 2, GPUS[90]).path == TILES


def bytes_of(tile: Tile, matrices: int, size: int) -> int:
    return (tile.bm + matrices * tile.bn) * tile.bk * size * tile.stages


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_tiles_fit_shared_memory(gpu: GpuFacts, dtype: torch.dtype) -> None:
    for experts, k, d, f in ((8, 2, 4096, 14336), (128, 8, 2048, 768), (2, 1, 64, 96), (512, 16, 1024, 512)):
        for tokens in (1, 2, 7, 33, 200, 1500, 100_000):
            for gated in (True, False):
                plan = choose(shape(experts, d, f, gated=gated, dtype=dtype), tokens, k, gpu)
                if isinstance(plan.first, Rows) or isinstance(plan.second, Rows):
                    continue
                assert plan.first.bm == plan.second.bm
                assert bytes_of(plan.first, 2 if gated else 1, dtype.itemsize) <= gpu.shared_bytes
                assert bytes_of(plan.second, 1, dtype.itemsize) <= gpu.shared_bytes


def test_what_is_shipped_is_chosen_where_it_was_measured() -> None:
    plans = measured((9, 0), 2)
    assert len(plans) >= 36
    assert {plan.path for plan in plans} == {GEMV, TILES, PERSISTENT}
    assert choose(shape(), 512, 2, GPUS[90]).origin == "shipped"
    assert choose(shape(4, 256, 200), 512, 2, GPUS[90]).origin == "cost model"
    assert choose(shape(), 512, 2, GPUS[80]).origin == "cost model"


def test_experts_hit() -> None:
    assert expected_hit(1, 2, 8) == pytest.approx(2)
    assert expected_hit(1000, 2, 8) == pytest.approx(8)
    assert expected_hit(4, 16, 8) == 8
