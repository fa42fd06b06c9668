"""Layers as ONNX Runtime's own MoE and QMoE, fed with logarithms of any router's weights.

T tokens, K experts per token, E experts, D model width, F expert width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest
import torch

import moec
from moec.backends.onnx.form import Form
from moec.backends.onnx.lower import region_model
from moec.backends.onnx.own_moe import why_not
from moec.backends.onnx.runtime import run, session
from moec.exporter.check import check_region
from moec.exporter.facts import Facts, facts_of
from moec.exporter.settings import Settings
from moec.exporter.ways import optimised, ways
from moec.ir import ExpertFfn, Region
from tests.onnx import models
from tests.onnx.test_int8 import store
from tests.passes.layers import mixtral_layer

LAYERS: list[dict[str, Any]] = [
    {"layout": "concat", "fn": "silu"},
    {"layout": "concat_up_first", "fn": "quick_gelu"},
    {"layout": "pair", "fn": "silu", "bias": True},
    {"layout": "none", "fn": "relu", "bias": True},
    {"layout": "interleaved", "fn": "silu", "alpha": 1.702, "limit": 7.0, "up_shift": 1.0, "bias": True},
    {"layout": "interleaved_up_first", "fn": "silu"},
]
FORMS = [Form(experts="moe"), Form(experts="qmoe", block=64), Form(experts="qmoe", bits=4, block=32)]
FORMS += [Form(experts="qmoe", block=64, half=True, cuda=True)]


def layer(**at: Any) -> Region:
    return optimised(mixtral_layer("m", e=6, k=2, d=64, f=128, **at))


def expert_op(region: Region) -> ExpertFfn:
    (op,) = [node.op for node in region.nodes if isinstance(node.op, ExpertFfn)]
    return op


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.experts}{form.bits}{'half' * form.half}")
@pytest.mark.parametrize("at", LAYERS, ids=lambda at: f"{at['layout']}-{at['fn']}")
def test_it_computes_the_layer(at: dict[str, Any], form: Form) -> None:
    region = layer(**at)
    assert why_not(expert_op(region), form) == ""
    check = check_region(region, region, store(region), form, 2e-6)
    assert check.passed, check.why
    assert "no token has an expert" in check.labels
    assert form.rounds_weights == (check.max_error > 1e-3)


def test_repeated_and_missing_experts_and_weights_that_may_be_anything() -> None:
    region = layer(layout="concat", fn="silu")
    weights = store(region)
    mine = session(region_model(region, weights, form=FORMS[0]))
    theirs = session(region_model(region, weights))
    nan = float("nan")
    ids = torch.tensor([[3, 3], [-1, 5], [6, 0], [2, 4], [1, 0]], dtype=torch.int32)
    factors = torch.tensor([[0.5, 0.25], [nan, 2.0], [float("inf"), 0.1], [0.0, 0.0], [1e-20, 7.0]])
    x = torch.randn(5, 64)
    (a,), (b,) = run(mine, [x, ids, factors]), run(theirs, [x, ids, factors])
    assert torch.allclose(a, b, atol=2e-6), (a - b).abs().max(1)


@pytest.mark.parametrize(
    ("at", "reason"),
    [
        ({"layout": "concat", "fn": "gelu"}, "silu alone, and this is gelu"),
        ({"layout": "none", "fn": "gelu"}, "it has no gelu"),
        ({"layout": "none", "fn": "relu", "limit": 2.0}, "with a clamp"),
        ({"layout": "concat", "fn": "silu", "limit": 2.0, "clamp_after": True}, "clamped behind it"),
    ],
    ids=lambda value: value["fn"] if isinstance(value, dict) else "",
)
def test_what_it_cannot_say_is_written_otherwise(at: dict[str, Any], reason: str) -> None:
    region = layer(**at)
    found = list(ways(region, Settings.make("m.onnx", target="cuda")))
    assert reason in found[0].why_not
    assert found[1].form == Form()


def test_widths_that_are_not_whole_blocks() -> None:
    region = optimised(mixtral_layer("m", e=6, k=2, d=48, f=40, layout="concat", fn="silu"))
    found = list(ways(region, Settings.make("m.onnx", target="cuda", quantize="int8")))
    assert "not whole blocks of 64" in found[0].why_not
    assert [way.form.experts for way in found[1:]] == ["sorted", "sorted"]


@pytest.mark.parametrize("name", [pytest.param("mixtral", marks=pytest.mark.slow), "switch"])
def test_a_whole_model_for_cuda(name: str, tmp_path: Path) -> None:
    report = moec.export(models.model(name), tmp_path / "m.onnx", models.inputs(name), target="cuda")
    assert {one.lowering for one in report.rewritten} == {"MoE, fp32"}
    assert report.least_onnxruntime == "1.31"
    kinds = [node.op_type for node in ir.load(tmp_path / "m.onnx").graph]
    assert kinds.count("MoE") == len(report.rewritten)


class Signed(models.OneLayer):
    """A layer whose router's weights may be below zero."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values, chosen = self.gate(x).topk(self.top_k, dim=-1)
        weights = values.tanh()
        out = torch.zeros_like(x)
        for e, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            token, slot = torch.where(chosen == e)
            out.index_add_(0, token, down(torch.relu(up(x[token]))) * weights[token, slot, None])
        return out


def test_weights_that_may_be_negative_are_written_otherwise(tmp_path: Path) -> None:
    torch.manual_seed(0)
    report = moec.export(Signed().eval(), tmp_path / "m.onnx", (torch.randn(9, 16),), target="cuda")
    (one,) = report.rewritten
    assert one.lowering == "sorted rows, a product for each expert"
    assert "does not prove that the router's weights are not negative" in one.tried[0]


@pytest.mark.parametrize(
    "quantize", [pytest.param(None, marks=pytest.mark.slow), "int8", pytest.param("int4", marks=pytest.mark.slow)]
)
def test_weights_that_are_made_while_writing_may_lie_beside_the_file(quantize: str | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = models.OneLayer(dim=64, hidden=64).eval(), torch.randn(9, 64)
    path = tmp_path / "m.onnx"
    report = moec.export(model, path, (x,), target="cuda", quantize=quantize, external_data=True)
    bits = {None: "MoE, fp32", "int8": "QMoE, int8 in blocks of 64, fp16", "int4": "QMoE, int4 in blocks of 64, fp16"}
    assert [one.lowering for one in report.rewritten] == [bits[quantize]]
    assert (tmp_path / "m.onnx.data").stat().st_size > 5 * 2 * 64 * 64 * {None: 4, "int8": 1, "int4": 0.5}[quantize]
    (mine,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})
    with torch.no_grad():
        theirs = model(x)
    apart = float((torch.from_numpy(mine) - theirs).norm() / theirs.norm())
    assert apart < {None: 2e-6, "int8": 0.03, "int4": 0.25}[quantize]


class Bypassed(torch.nn.Module):
    """A model that reads its layer's parameters and never calls the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = models.OneLayer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return models.OneLayer.forward(self.inner, x)


def test_a_layer_that_the_model_never_calls(tmp_path: Path) -> None:
    with pytest.raises(moec.MoecError, match=r"MOEC705.*never called"):
        moec.export(Bypassed().eval(), tmp_path / "m.onnx", (torch.randn(9, 16),))
    assert list(tmp_path.iterdir()) == []


def graph(*steps: tuple[str, dict[str, Any]]) -> tuple[Any, Any]:
    """ids[T, 2] and weights[T, 2] of a TopK over 6 scores, with these steps behind the weights."""
    scores = ir.Value(name="scores", shape=ir.Shape(["T", 6]), type=ir.TensorType(ir.DataType.FLOAT))
    k = ir.Value(name="k", const_value=ir.tensor([2]))
    top = ir.node("TopK", [scores, k], num_outputs=2)
    value, ids = top.outputs
    ids.shape = ir.Shape(["T", 2])
    for kind, attributes in steps:
        value.shape = ir.Shape(["T", 2])
        if kind == "Div":
            axes = ir.Value(name="axes", const_value=ir.tensor([-1]))
            total = ir.node("ReduceSum", [value, axes], {"keepdims": 1}).outputs[0]
            value = ir.node("Div", [value, total]).outputs[0]
        else:
            value = ir.node(kind, [value], attributes).outputs[0]
    value.shape = ir.Shape(["T", 2])
    return ids, value


def test_what_a_graph_proves() -> None:
    assert facts_of(*graph(), 6) == Facts(chosen=True)
    assert facts_of(*graph(), 7) == Facts()
    assert facts_of(*graph(("Sigmoid", {})), 6) == Facts(chosen=True, nonnegative=True)
    assert facts_of(*graph(("Softmax", {"axis": -1})), 6) == Facts(True, True, True)
    assert facts_of(*graph(("Softmax", {"axis": 0})), 6) == Facts(True, True, False)
    assert facts_of(*graph(("Div", {})), 6) == Facts(True, False, True)
    assert facts_of(*graph(("Sigmoid", {}), ("Div", {})), 6) == Facts(True, True, True)
    assert facts_of(*graph(("Sigmoid", {}), ("Neg", {})), 6) == Facts(chosen=True)
    assert facts_of(*graph(("Sigmoid", {}), ("Log", {}), ("Identity", {})), 6) == Facts(chosen=True)
