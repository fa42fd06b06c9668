"""Measured plans: kept, found again, preferred to the cost model's, and searched for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moec.backends.triton import store, tune
from moec.backends.triton.candidates import paths, row_counts, rows_near, tiles_near
from moec.backends.triton.choose import GEMV, PERSISTENT, TILES, Plan, Rows, Shape, Tile, choose
from moec.backends.triton.gpu import GpuFacts
from moec.backends.triton.operands import Operands
from moec.backends.triton.prepare import Prepared, prepare
from moec.backends.triton.store import Entry, cache_file, key_of, lookup, record
from moec.cli import main
from moec.ir import Builder, ExpertFfn, Tensor

H100 = GpuFacts("NVIDIA H100 80GB HBM3", (9, 0), 132, 50 << 20, 227 << 10)
A100 = GpuFacts("NVIDIA A100", (8, 0), 108, 40 << 20, 163 << 10)
SHAPE = Shape(16, 1024, 512, 1024, True, torch.bfloat16, torch.bfloat16, (False, False), True)
PLAN = Plan(TILES, Tile(16, 32, 64, 4, 3), Tile(16, 64, 64, 4, 3), store.HERE)
GEMV_PLAN = Plan(GEMV, Rows(2, 512), Rows(4, 1024, 8), store.HERE)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MOEC_CACHE", str(tmp_path / "cache"))
    store._read.cache_clear()
    yield
    store._read.cache_clear()


def test_what_is_kept_is_found_again() -> None:
    path = record([Entry(key_of(SHAPE, 2), 64, PLAN, 10.0), Entry(key_of(SHAPE, 2), 1, GEMV_PLAN, 3.0)], H100.name)
    assert path == cache_file(H100.name)
    assert lookup(SHAPE, 2, 64, H100.name) == PLAN
    assert lookup(SHAPE, 2, 1, H100.name) == GEMV_PLAN
    assert lookup(SHAPE, 2, 50, H100.name) == PLAN
    assert json.loads(path.read_text())["gpu"] == H100.name


@pytest.mark.parametrize(("tokens", "k"), [(8, 2), (200, 2), (2, 2), (64, 4)])
def test_what_is_not_near_is_not_taken(tokens: int, k: int) -> None:
    record([Entry(key_of(SHAPE, 2), 64, PLAN, 10.0), Entry(key_of(SHAPE, 2), 1, GEMV_PLAN, 3.0)], H100.name)
    assert lookup(SHAPE, k, tokens, H100.name) is None
    assert lookup(SHAPE, 2, 64, A100.name) is None


def test_newer_results_replace_older_ones_and_keep_the_rest() -> None:
    faster = PLAN._replace(second=Tile(16, 128, 64, 4, 3))
    record([Entry(key_of(SHAPE, 2), 64, PLAN, 10.0), Entry(key_of(SHAPE, 2), 8, PLAN, 4.0)], H100.name)
    record([Entry(key_of(SHAPE, 2), 64, faster, 9.0)], H100.name)
    assert lookup(SHAPE, 2, 64, H100.name) == faster
    assert lookup(SHAPE, 2, 8, H100.name) == PLAN


@pytest.mark.parametrize("text", ["", "{", "[]", '{"entries": [{"key": "x"}]}', '{"entries": 3}'])
def test_a_damaged_file_is_said_and_not_used(text: str) -> None:
    path = cache_file(H100.name)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.warns(UserWarning, match="MOEC610"):
        assert lookup(SHAPE, 2, 64, H100.name) is None


def test_the_key_tells_apart_what_plans_depend_on() -> None:
    others = [
        SHAPE,
        Shape(16, 1024, 512, 1024, False, torch.bfloat16, torch.bfloat16, (False, False), True),
        Shape(16, 1024, 512, 1024, True, torch.float16, torch.float16, (False, False), True),
        Shape(16, 1024, 512, 1024, True, torch.bfloat16, torch.int8, (False, False), True),
        Shape(16, 1024, 512, 1024, True, torch.bfloat16, torch.bfloat16, (True, False), True),
        Shape(16, 1024, 512, 1024, True, torch.bfloat16, torch.bfloat16, (False, False), False),
    ]
    assert len({key_of(shape, k) for shape in others for k in (1, 2)}) == 12


def prepared() -> Prepared:
    b = Builder("layer")
    x, ids = b.input("x", Tensor.of("f32", "T", 16)), b.input("ids", Tensor.of("i64", "T", "K"))
    weights = b.input("weights", Tensor.of("f32", "T", "K"))
    w_in, w_out = b.input("w_in", Tensor.of("f32", 4, 24, 16)), b.input("w_out", Tensor.of("f32", 4, 16, 12))
    op = ExpertFfn(x, ids, weights, w_in, w_out, fn="silu", layout="concat")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    operands = Operands(torch.randn(4, 24, 16, device=device), torch.randn(4, 16, 12, device=device))
    return prepare(op, operands, device)


def test_a_measured_plan_goes_before_the_cost_model() -> None:
    one = prepared()
    assert one.plan(8, 2).origin == "cost model"
    record([Entry(key_of(one.shape, 2), 8, PLAN, 1.0)], one.facts.name)
    assert one.plan(8, 2) == PLAN


def test_the_search_finds_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times that prefer narrow second tiles and long first steps, and a compiler that refuses some."""
    said: list[str] = []

    def measured(self: object, plan: Plan) -> float:
        if isinstance(plan.first, Rows) or isinstance(plan.second, Rows):
            return 1000.0
        if plan.first.stages == 5:
            raise RuntimeError("out of shared memory")
        away = abs(plan.first.bk - 128) + abs(plan.second.bn - 32) + abs(plan.first.bm - 16)
        return 100.0 + away

    monkeypatch.setattr(tune._Search, "_measure", measured)
    found = tune.tune(prepared(), 2, 16, said.append)
    first, second = found.entry.plan.first, found.entry.plan.second
    assert isinstance(first, Tile)
    assert isinstance(second, Tile)
    assert (first.bm, first.bk, second.bm, second.bn) == (16, 128, 16, 32)
    assert found.entry.us < found.before_us
    assert found.failed > 0
    assert len(said) == found.tried
    assert found.entry.plan.origin == store.HERE


@pytest.mark.parametrize("facts", [H100, A100])
@pytest.mark.parametrize("tokens", [1, 8, 64, 512, 4096])
def test_candidates_fit_the_gpu(tokens: int, facts: GpuFacts) -> None:
    plans = paths(SHAPE, tokens, 2, facts)
    assert plans[0]._replace(origin="") == choose(SHAPE, tokens, 2, facts)._replace(origin="")
    assert len({plan.path for plan in plans}) == len(plans)
    assert facts.hopper or all(plan.path != PERSISTENT for plan in plans)
    for plan in plans:
        if isinstance(plan.first, Rows):
            assert len(list(rows_near(plan.first))) > 4
            assert row_counts(plan) == []
            continue
        assert plan.first.bm not in row_counts(plan)
        near = [t for t in tiles_near(plan.first, plan.path, 2, facts) if t.flatten == plan.first.flatten]
        assert len(set(near)) == len(near) > 4
        assert all(t.stages * (t.bm + 2 * t.bn) * t.bk * 2 <= facts.shared_bytes for t in near)


def test_without_a_gpu_there_is_nothing_to_tune(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["tune", "nowhere.py:make"]) == 1
    assert "[MOEC408] nothing to tune: there is no CUDA device" in capsys.readouterr().err
