"""Experts whose products stand one behind the other, against the same experts side by side. T tokens, E experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moec.backends.onnx.form import EXACT, Form
from moec.backends.onnx.lower import region_model
from moec.backends.onnx.runtime import run, session
from moec.exporter.check import check_region
from moec.exporter.settings import Settings
from moec.exporter.ways import optimised, ways
from moec.ir import Region
from tests.backends.running import Weights
from tests.backends.test_fused import FORMS
from tests.onnx.test_int8 import store
from tests.passes.layers import dense_layer, mixtral_layer

CHAINED = Form(chained=True)


def layer(**at: Any) -> Region:
    return mixtral_layer("m", e=5, k=2, d=16, f=12, **at)


def forms_of(region: Region, **settings: Any) -> list[Form]:
    found = ways(optimised(region), Settings.make("m.onnx", **settings))
    return [way.form for way in found if way.rival]


@pytest.mark.parametrize("at", FORMS, ids=lambda at: f"{at['fn']}-{at['layout']}")
def test_every_activation_over_odd_routings(at: dict[str, Any]) -> None:
    region = optimised(layer(**at, bias=True))
    check = check_region(region, region, store(region), CHAINED, 2e-6)
    assert check.passed, check.why
    assert check.max_error < 2e-6


def test_both_forms_give_the_same_numbers() -> None:
    region = optimised(layer(layout="concat_up_first", fn="silu"))
    weights = store(region)
    x, ids, factors = torch.randn(7, 16), torch.randint(-1, 6, (7, 2), dtype=torch.int32), torch.rand(7, 2)
    x[3] = float("nan")
    ids[3] = -1
    (a,), (b,) = (run(session(region_model(region, weights, form=f)), [x, ids, factors]) for f in (EXACT, CHAINED))
    assert a.isfinite().all()
    assert torch.equal(a, b)


def test_a_chain_reads_the_model_s_own_matrices() -> None:
    """Halves of one matrix are no copies, and all of it is written once."""
    region = optimised(layer(layout="concat", fn="silu"))
    model = region_model(region, store(region), form=CHAINED)
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("Gemm") == 15
    assert kinds.count("Split") == 1
    between = kinds[kinds.index("Split") + 1 : len(kinds) - kinds[::-1].index("Gemm")]
    assert set(between) == {"Gemm", "Sigmoid", "Mul"}
    held = sum(v.const_value.size for v in model.graph.initializers.values() if len(v.const_value.shape) == 2)
    assert held == 5 * 3 * 16 * 12


def test_portable_chains_hold_no_op_of_one_runtime() -> None:
    region = optimised(layer(layout="concat", fn="silu"))
    for quantize in (None, "int8"):
        for way in ways(region, Settings.make("m.onnx", target="portable", quantize=quantize)):
            model = region_model(way.region, store(region), form=way.form)
            assert {node.domain for node in model.graph} == {""}


@pytest.mark.parametrize("chained", [False, True])
def test_an_expert_that_is_no_number_shows(chained: bool) -> None:
    """In int8, where a largest number may overlook it: for its tokens, and for no others."""
    region = optimised(layer(layout="pair", fn="silu"))
    weights = Weights()
    for ref, type in region.weights.items():
        bank = torch.randn(type.evaluate({})) / 4
        bank[2, 3, 5] = float("nan") if bank.shape[1] == 12 else 0.0
        weights.stacked(ref, bank)
    found = ways(region, Settings.make("m.onnx", target="cpu", quantize="int8"))
    way = next(way for way in found if way.form == Form(products="integer_to_float", chained=chained))
    ids = torch.tensor([[0, 1], [2, 3], [4, 2], [3, 4]], dtype=torch.int32)
    (y,) = run(
        session(region_model(way.region, weights.store(), form=way.form)), [torch.randn(4, 16), ids, torch.rand(4, 2)]
    )
    assert y.isfinite().all(1).tolist() == [True, False, False, True]
    assert not y[1:3].isfinite().any()


def test_rivals_by_target() -> None:
    region = layer(layout="concat", fn="silu")
    for target in ("cpu", "portable"):
        assert forms_of(region, target=target) == [EXACT, CHAINED]
    assert forms_of(region, target="cuda") == []
    assert forms_of(region, target="portable", quantize="int8") == [
        Form(products="integer"),
        Form(products="integer", chained=True),
    ]
    assert [form.chained for form in forms_of(region, target="cpu", quantize="int8")] == [False, True]
    assert forms_of(dense_layer("m", d=32, f=24, layout="pair", fn="silu"), target="cpu") == []


def test_doubles_are_chained_too() -> None:
    region = optimised(layer(layout="pair", fn="silu", dtype="f64"))
    weights = Weights()
    for ref, type in region.weights.items():
        weights.stacked(ref, torch.randn(type.evaluate({}), dtype=torch.float64) / 4)
    check = check_region(region, region, weights.store(), CHAINED, 1e-12)
    assert check.passed, check.why
