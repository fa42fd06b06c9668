"""int8 weights with rows rounded to int8, over routings that are easy to get wrong. T tokens, D model width."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moec.backends.onnx.form import INTEGER, Form
from moec.backends.onnx.lower import region_model
from moec.backends.onnx.runtime import run, session
from moec.exporter.check import check_region
from moec.exporter.settings import Settings
from moec.exporter.ways import optimised, ways
from moec.ir import Region
from tests.backends.running import DTYPES, Weights
from tests.passes.layers import dense_layer, mixtral_layer

FORMS: list[dict[str, Any]] = [
    {"layout": "concat", "fn": "silu"},
    {"layout": "pair", "fn": "gelu", "bias": True},
    {"layout": "none", "fn": "relu", "bias": True},
    {"layout": "interleaved", "fn": "silu", "alpha": 1.702, "limit": 7.0, "up_shift": 1.0, "bias": True},
]


def store(region: Region) -> Any:
    """Random weights for every reference."""
    weights = Weights()
    for ref, type in region.weights.items():
        tensor = (torch.randn(type.evaluate({})) / max(1, type.shape[-1].evaluate({})) ** 0.5).to(DTYPES[type.dtype])
        many = "order" in str(region) or type.rank == 3
        weights.stacked(ref, tensor) if many else weights.dense(ref, tensor)
    return weights.store()


@pytest.mark.parametrize("at", FORMS, ids=lambda at: str(at["layout"]))
@pytest.mark.parametrize("make", ["experts", "dense"])
def test_every_form_stays_near(make: str, at: dict[str, Any]) -> None:
    region = mixtral_layer("m", e=6, k=2, d=32, f=24, **at) if make == "experts" else dense_layer("m", d=32, f=24, **at)
    weights = store(region)
    exact = optimised(region)
    way = next(ways(exact, Settings.make("m.onnx", target="portable", quantize="int8")))
    assert way.form == INTEGER
    check = check_region(exact, way.region, weights, way.form, 2e-6)
    assert check.passed, check.why
    assert 1e-4 < check.max_error < 0.06


SORTED = [Form(products=p, chained=chained) for p in ("integer", "integer_to_float") for chained in (False, True)]
each_form = pytest.mark.parametrize("form", SORTED, ids=lambda form: f"{form.products}-{form.chained}")


def written_as(exact: Region, form: Form) -> Region:
    """The region as it is written in this form."""
    found = [w for t in ("portable", "cpu") for w in ways(exact, Settings.make("m.onnx", target=t, quantize="int8"))]
    return next(way.region for way in found if way.form == form)


@each_form
@pytest.mark.parametrize(
    "at", [*FORMS, *({"layout": one} for one in ("concat_up_first", "interleaved_up_first"))], ids=str
)
def test_every_place_of_gate_and_up(at: dict[str, Any], form: Form) -> None:
    """In both products, side by side and one behind the other; down to no token at all."""
    region = mixtral_layer("m", e=6, k=2, d=32, f=24, **{"fn": "silu", **at})
    weights = store(region)
    exact = optimised(region)
    region = written_as(exact, form)
    check = check_region(exact, region, weights, form, 2e-6)
    assert check.passed, check.why
    assert 1e-4 < check.max_error < 0.06
    none = [torch.zeros(0, 32), torch.zeros(0, 2, dtype=torch.int32), torch.zeros(0, 2)]
    (empty,) = run(session(region_model(region, weights, form=form)), none)
    assert empty.shape == (0, 32)


@each_form
@pytest.mark.parametrize("at", FORMS, ids=lambda at: str(at["layout"]))
def test_what_is_no_number_stays_none(at: dict[str, Any], form: Form) -> None:
    """Also where only what lies between the products overflows, and never beyond its own token."""
    exact = optimised(mixtral_layer("m", e=6, k=2, d=32, f=24, **at))
    weights = store(exact)
    runtime = session(region_model(written_as(exact, form), weights, form=form))
    x, ids = torch.randn(9, 32), torch.randint(0, 6, (9, 2), dtype=torch.int32)
    factors = torch.rand(9, 2)
    (alone,) = run(runtime, [x, ids, factors])
    for row, value in ((0, float("nan")), (1, float("inf")), (2, -float("inf")), (3, 3e38)):
        x[row, 5] = value
    x[4] *= 1e38 / x[4].abs().max()
    x[5] = 0
    ids[6] = -1
    x[6] = float("nan")
    (found,) = run(runtime, [x, ids, factors])
    assert not found[:3].isfinite().any()
    if at["layout"] in ("concat", "pair"):  # gate times up is beyond f32
        assert not found[3:5].isfinite().any()
    assert not found[6].any()
    assert torch.equal(found[7:], alone[7:])


def test_a_token_does_not_depend_on_the_others() -> None:
    region = mixtral_layer("m", e=6, k=2, d=32, f=24, layout="concat", fn="silu")
    weights = store(region)
    way = next(ways(optimised(region), Settings.make("m.onnx", target="portable", quantize="int8")))
    runtime = session(region_model(way.region, weights, form=way.form))
    x, ids, factors = torch.randn(9, 32), torch.randint(0, 6, (9, 2), dtype=torch.int32), torch.rand(9, 2)
    (alone,) = run(runtime, [x[3:4], ids[3:4], factors[3:4]])
    x[5] *= 1e6
    x[7] = float("nan")
    (together,) = run(runtime, [x, ids, factors])
    assert torch.equal(together[3], alone[0])
    assert together.isnan().all(1).tolist() == [i == 7 for i in range(9)]
