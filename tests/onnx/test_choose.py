"""Which form is taken on CPUs: by a model of cost, or by measuring. E experts, T tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moec.exporter import choose
from moec.exporter.choose import cache_file, fastest_first
from moec.exporter.lowerings import place
from moec.exporter.result import ExportedLayer
from moec.exporter.settings import Settings
from moec.exporter.ways import Way, optimised, ways
from moec.ir import Region
from tests.onnx.test_int8 import store
from tests.passes.layers import mixtral_layer


def layer(e: int, k: int, d: int, f: int) -> Region:
    return optimised(mixtral_layer("m", e=e, k=k, d=d, f=f, layout="concat", fn="silu"))


def rivals(region: Region, quantize: str | None = "int8") -> list[Way]:
    return [way for way in ways(region, Settings.make("m.onnx", target="cpu", quantize=quantize)) if way.rival]


def first(region: Region, *tokens: int) -> str:
    order, told = fastest_first(rivals(region), store(layer(2, 1, 32, 32)), tokens, tune=False)
    assert told.startswith("by a model of cost, at ")
    return order[0].form.experts


def test_the_model_takes_what_was_faster_where_it_was_measured() -> None:
    small, large = layer(64, 8, 1024, 512), layer(8, 2, 1024, 3584)
    assert first(small, 1) == "qmoe"
    assert first(large, 1) == "sorted"
    for region in (small, large):
        assert first(region, 32) == first(region, 256) == first(region) == first(region, 1, 32, 256) == "sorted"


def chained(region: Region, quantize: str | None, *tokens: int) -> bool:
    order, _ = fastest_first(rivals(region, quantize), store(layer(2, 1, 32, 32)), tokens, tune=False)
    return next(way.form.chained for way in order if way.form.experts == "sorted")


def test_the_model_chains_few_experts_and_many_rows() -> None:
    small, large = layer(64, 8, 1024, 512), layer(8, 2, 1024, 3584)
    for quantize in (None, "int8"):
        assert chained(large, quantize)
        assert not chained(small, quantize)
        assert not chained(small, quantize, 1)
        assert chained(small, quantize, 256)
    assert not chained(large, "int8", 1)


def test_measuring_is_kept_and_a_damaged_cache_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEC_CACHE", str(tmp_path))
    region = layer(4, 2, 64, 64)
    weights, found = store(region), rivals(layer(4, 2, 64, 64))
    monkeypatch.setattr(choose, "Effort", lambda seconds: choose_effort())
    order, told = fastest_first(found, weights, (1, 3), tune=True)
    assert told.startswith("measured here, at 1, 3 tokens: ")
    kept = json.loads(cache_file().read_text())
    assert len(kept) == 2 * len(found) == 6

    slow = {key: (9.0 if order[0].title in key else 1.0) for key in kept}
    cache_file().write_text(json.dumps(slow))
    assert fastest_first(found, weights, (1, 3), tune=True)[0][0] is not order[0]
    for damaged in ("{", "[1]", '{"a": "b"}'):
        cache_file().write_text(damaged)
        assert len(fastest_first(found, weights, (3,), tune=True)[0]) == len(found)


def choose_effort() -> object:
    from moec.bench import Effort

    return Effort(seconds=0.01, min_runs=3, max_runs=5, warmup=1)


def test_the_report_says_how_it_was_chosen() -> None:
    region = layer(4, 2, 64, 64)
    told = ExportedLayer("m", "moe", "left alone")
    settings = Settings.make("m.onnx", target="cpu", quantize="int8", tokens=[1])
    placed = place(region, store(region), settings, told, 2e-6)
    assert placed is not None
    assert told.choice.startswith("by a model of cost, at 1 tokens: ")
    assert told.tried == []
