"""What a graph proves about a router, and what must not pass for a proof. T tokens, K experts per token, E experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest
import torch

import moec
from moec.exporter import insert, place_layer
from moec.exporter.facts import Facts, facts_of
from tests.onnx import models, written
from tests.onnx.reading import refused
from tests.onnx.test_own_moe import graph


def weighed(kind: str, *inputs: Any, **attributes: Any) -> Any:
    """The result of one node over these, with a shape where it is [T, 2]."""
    return ir.node(kind, [*inputs], attributes).outputs[0]


def constant(array: Any) -> ir.Value:
    return ir.Value(const_value=ir.tensor(array))


def test_sums_over_several_tokens_prove_nothing() -> None:
    """weights / weights.reshape(1, -1).sum(-1), and over the tokens."""
    for sizes, axes, back in (([1, -1], [-1], [1, 1]), ([1, -1, 2], [1], [1, 2])):
        ids, weights = graph(("Sigmoid", {}))
        rows = weighed("Reshape", weights, constant(sizes))
        rows.shape = ir.Shape([1, "2*T"] if len(sizes) == 2 else [1, "T", 2])
        total = weighed("ReduceSum", rows, constant(axes), keepdims=1)
        total.shape = ir.Shape([1] * len(sizes) if len(sizes) == 2 else [1, 1, 2])
        total = weighed("Reshape", total, constant(back))
        total.shape = ir.Shape(back)
        value = weighed("Div", weights, total)
        value.shape = ir.Shape(["T", 2])
        assert facts_of(ids, value, 6) == Facts(chosen=True, nonnegative=True)


@pytest.mark.parametrize(("kinds", "proved"), [(["FLOAT16", "FLOAT"], True), (["BOOL", "FLOAT"], False)])
def test_a_cast_to_another_kind_of_number_ends_a_proof(kinds: list[str], proved: bool) -> None:
    ids, value = graph(("Softmax", {"axis": -1}))
    value.type = ir.TensorType(ir.DataType.FLOAT)
    for kind in kinds:
        value = weighed("Cast", value, to=ir.DataType[kind].value)
        value.shape, value.type = ir.Shape(["T", 2]), ir.TensorType(ir.DataType[kind])
    assert facts_of(ids, value, 6).sums_to_one == proved


@pytest.mark.parametrize(("numbers", "proved"), [([0.0, 1.0], True), ([0.5, -1.0], False)])
def test_a_one_hot_has_the_sign_of_its_numbers(numbers: list[float], proved: bool) -> None:
    ids, _ = graph()
    value = weighed("OneHot", ids, constant(2), constant(numbers))
    assert facts_of(ids, weighed("ReduceMax", value), 6).nonnegative == proved


class WithNone(models.OneLayer):
    """Its router has a last column that is no expert, and that no token chooses while it is exported."""

    def __init__(self) -> None:
        super().__init__(dim=64, hidden=64, experts=8)
        self.gate = torch.nn.Linear(64, 9)
        with torch.no_grad():
            self.gate.weight[-1] /= 4
            self.gate.bias[-1] = -100

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        best, chosen = self.gate(x).topk(self.top_k, dim=-1)
        weights = best.softmax(-1)
        out = torch.zeros_like(x)
        for e, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            token, slot = torch.where(chosen == e)
            out.index_add_(0, token, down(torch.relu(up(x[token]))) * weights[token, slot, None])
        return out


@pytest.mark.parametrize("target", ["cpu", "cuda"])
@pytest.mark.parametrize("by", ["moec", "torch"])
def test_a_column_of_the_router_that_is_no_expert(by: str, target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, out = WithNone().eval(), tmp_path / "out.onnx"
    if by == "moec":
        moec.export(model, out, (torch.randn(9, 64),), target=target)
    else:
        moec.export(written.unrolled(model, torch.randn(9, 64), tmp_path / "in.onnx"), out, target=target)
    x = torch.randn(40, 64)
    # Raises the last logit alone.
    x[:20] += 130 * torch.linalg.pinv(model.gate.weight.detach())[:, -1]
    assert (model.gate(x).topk(2).indices == 8).sum() == 20
    (mine,) = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})
    with torch.no_grad():
        theirs = model(x)
    assert (torch.from_numpy(mine) - theirs).norm() <= 1e-5 * theirs.norm()


def everything(*_: Any) -> Facts:
    return Facts(True, True, True)


class Tenth(models.OneLayer):
    """Weights whose sum is a tenth."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        best, chosen = self.gate(x).topk(self.top_k, dim=-1)
        weights = best.softmax(-1) / 10
        out = torch.zeros_like(x)
        for e, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            token, slot = torch.where(chosen == e)
            out.index_add_(0, token, down(torch.relu(up(x[token]))) * weights[token, slot, None])
        return out


def test_rounding_weights_covers_no_other_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proof that is wrong shows in the whole file, also where its weights are rounded."""
    monkeypatch.setattr(insert, "facts_of", everything)
    monkeypatch.setattr(place_layer, "facts_about", everything)
    torch.manual_seed(0)
    model, x, out = Tenth(dim=64, hidden=64).eval(), torch.randn(9, 64), tmp_path / "out.onnx"
    with pytest.raises(moec.MoecError, match=r"MOEC704.*the whole model differs"):
        moec.export(model, out, (x,), target="cuda", quantize="int8")
    source = written.unrolled(model, x, tmp_path / "in.onnx")
    assert "the whole file differs" in refused("MOEC704", source, out, target="cuda", quantize="int8").message
    assert not out.exists()
