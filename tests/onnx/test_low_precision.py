"""Models in 16 bits, and models elsewhere than on the CPU. T tokens, D model width."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import moec
from moec.backends.onnx.bound import run_in_order
from moec.backends.onnx.form import Form
from moec.backends.onnx.runtime import session
from moec.exporter import prepare as preparing
from moec.exporter.check import Met
from moec.exporter.prepare import prepare
from moec.exporter.probes import region_probes
from moec.exporter.result import ExportReport
from moec.exporter.rounding import judge_rounding
from moec.exporter.whole import Written
from moec.frontends.onnx.widen import in_fp32
from moec.frontends.torch.twin import make_twin
from moec.verify import LOW_PRECISION_FACTOR
from tests.onnx import models
from tests.onnx.models import OneLayer
from tests.onnx.reading import outputs


def layer(dtype: torch.dtype, **sizes: int) -> OneLayer:
    torch.manual_seed(0)
    return OneLayer(**sizes).to(dtype).eval()


def off(mine: Any, exact: torch.Tensor) -> float:
    found = torch.as_tensor(np.asarray(mine)).double()
    return float((found - exact).norm() / exact.norm())


def test_fp16_is_as_near_to_fp32_as_the_model_is(tmp_path: Path) -> None:
    model, path = layer(torch.float16), tmp_path / "m.onnx"
    report = moec.export(model, path, (torch.randn(7, 16).half(),), tokens=[4], seconds=0.0)
    assert report.original_error is not None
    assert report.whole_model_error is not None
    assert 1e-5 < report.whole_model_error <= LOW_PRECISION_FACTOR * report.original_error
    (told,) = report.rewritten
    assert told.bar is not None
    assert told.max_error is not None
    assert told.max_error <= told.bar < 2e-3
    held = onnx.load(str(path))
    assert {one.data_type for one in held.graph.initializer if len(one.dims) == 2} == {10}
    x = torch.randn(301, 16, generator=torch.Generator().manual_seed(3)).half()
    with torch.no_grad():
        own, exact = model(x), make_twin(model, torch.Tensor.float)(x.float()).double()
    (mine,) = outputs(path, {"x": x.numpy()})
    assert mine.dtype == np.float16
    assert off(mine, exact) <= LOW_PRECISION_FACTOR * off(own, exact)
    properties = {one.key: one.value for one in held.metadata_props}
    assert "against fp32, from which the model itself is" in properties["moec.verification"]
    assert "its own" in str(report)


def test_bf16_is_written_in_fp32_for_the_cpu(tmp_path: Path) -> None:
    model, path, x = layer(torch.bfloat16), tmp_path / "m.onnx", torch.randn(7, 16)
    report = moec.export(model, path, (x.bfloat16(),))
    assert "model.half() is written in fp16" in report.notes[0]
    with torch.no_grad():
        exact = make_twin(model, torch.Tensor.float)(x).double()
    (mine,) = outputs(path, {"x": x.numpy()})
    assert mine.dtype == np.float32
    assert off(mine, exact) <= 2e-6
    assert model.gate.weight.dtype == torch.bfloat16


def test_bf16_stays_for_cuda(tmp_path: Path) -> None:
    from moec.backends.onnx.providers import why_no_cuda

    path = tmp_path / "m.onnx"
    report = moec.export(layer(torch.bfloat16), path, (torch.randn(7, 16).bfloat16(),), target="cuda")
    held = onnx.load(str(path))
    assert held.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16
    assert {one.data_type for one in held.graph.initializer if len(one.dims) == 2} == {16}
    if why_no_cuda():
        assert report.checked_as.startswith("a copy of the file in fp32")
        properties = {one.key: one.value for one in held.metadata_props}
        assert "checked as a copy of the file in fp32" in properties["moec.verification"]
        assert report.load_seconds is None
    assert report.rewritten[0].lowering.startswith("MoE, bf16")
    assert "MoE" in {node.op_type for node in held.graph.node}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_int8_of_16_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    model, path, x = layer(dtype, dim=32, hidden=64), tmp_path / "m.onnx", torch.randn(64, 32).to(dtype)
    report = moec.export(model, path, (x,), quantize="int8")
    assert "int8 weights and rows" in report.rewritten[0].lowering
    assert {3} <= {one.data_type for one in onnx.load(str(path)).graph.initializer}
    with torch.no_grad():
        exact = make_twin(model, torch.Tensor.float)(x.float()).double()
    given = x.half() if dtype == torch.float16 else x.float()
    (mine,) = outputs(path, {"x": given.numpy()})
    assert 1e-4 < off(mine, exact) < 3.5e-2


# In fp16 NLLB-MoE asks whether values are finite, and torch.export records no such question.
FAMILIES = [
    (name, dtype)
    for name in ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "dbrx", "switch", "nllb_moe")
    for dtype in (torch.float16, torch.bfloat16)
    if (name, dtype) != ("nllb_moe", torch.float16)
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), FAMILIES)
def test_transformers_models(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = models.model(name).to(dtype)
    for target in ("cpu", "cuda"):
        report = moec.export(model, tmp_path / "m.onnx", models.inputs(name), target=target)
        assert [one.status for one in report.layers if one.kind == "moe"] == ["rewritten"] * 2
        assert report.whole_model_error is not None
        if target == "cpu" and dtype == torch.bfloat16:
            assert report.whole_model_error <= 2e-6


class Fixed(nn.Module):
    """A layer behind code that names its type: x[T, 16] -> [T, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = OneLayer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x.half())
        return y


def test_a_model_that_does_not_run_in_fp32(tmp_path: Path) -> None:
    with pytest.raises(moec.MoecError, match=r"MOEC704.*does not run in fp32"):
        moec.export(Fixed().half().eval(), tmp_path / "m.onnx", (torch.randn(7, 16).half(),))
    assert list(tmp_path.iterdir()) == []


def judged(mine: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor, *, same: bool = True) -> str:
    met = [Met("7 tokens", [mine], [theirs], [])]
    report = ExportReport("m", Path("m.onnx"), "cpu")
    return judge_rounding(met, lambda _: [exact], {"7 tokens": []}, [same], "", report, quantized=False).why


def test_the_bar_of_16_bits() -> None:
    exact = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    theirs = exact.half()
    noise = (theirs.float() - exact).flip(0)
    assert judged(theirs, theirs, exact) == ""
    assert judged((exact + noise).half(), theirs, exact) == ""
    assert "all inputs together: error" in judged((exact + 3 * noise).half(), theirs, exact)
    # A model that itself goes elsewhere than in fp32 does not excuse a file that goes elsewhere still.
    assert "7 tokens: error" in judged((3 * exact).half(), (1.2 * exact).half(), exact)
    assert judged((1.2 * exact).half(), (1.2 * exact).half(), exact) == ""
    assert judged((3 * exact).half(), theirs, exact, same=False) == ""
    strange = theirs.clone()
    strange[3, 4] = float("nan")
    assert "not finite" in judged(strange, theirs, exact)
    assert judged(theirs, strange, exact) == ""
    assert "instead of" in judged(exact, theirs, exact)
    assert "instead of" in judged(theirs[1:], theirs, exact)


def test_a_graph_in_fp32_says_the_same_without_rounding() -> None:
    from moec.backends.onnx.lower import region_model
    from tests.onnx.test_int8 import store
    from tests.passes.layers import mixtral_layer

    wide = mixtral_layer("m", e=6, k=2, d=64, f=128, layout="concat", fn="silu")
    low = mixtral_layer("m", e=6, k=2, d=64, f=128, layout="concat", fn="silu", dtype="bf16")
    for form in (Form(), Form(experts="moe")):
        torch.manual_seed(0)
        narrow = region_model(low, store(low), form=form)
        before = [value.dtype for value in narrow.graph.inputs]
        copy = session(in_fp32(narrow))
        assert [value.dtype for value in narrow.graph.inputs] == before
        torch.manual_seed(0)
        theirs = session(region_model(wide, store(wide), form=form))
        _, given = next(region_probes(wide, nonnegative=True))
        (a,), (b,) = run_in_order(copy, given), run_in_order(theirs, given)
        assert a.dtype == torch.float32
        assert float((a - b).norm()) <= 1e-2 * float(b.norm())  # the weights were rounded


def test_bf16_goes_in_and_out_of_a_session() -> None:
    from moec.backends.onnx.lower import region_model
    from tests.onnx.test_int8 import store
    from tests.passes.layers import mixtral_layer

    region = mixtral_layer("m", e=6, k=2, d=64, f=128, layout="concat", fn="silu", dtype="bf16")
    _, given = next(region_probes(region))
    (y,) = run_in_order(session(region_model(region, store(region))), given)
    assert y.dtype == torch.bfloat16


def test_a_model_elsewhere_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model = OneLayer().to("meta")
    with pytest.raises(moec.MoecError, match=r"MOEC503.*gate.weight is on meta"):
        prepare(model, ((torch.randn(7, 16),), {}), "cpu")
    # No GPU is needed for what follows: meta stands for one, and what copies from it for torch.
    monkeypatch.setattr(preparing, "NOWHERE", ())
    monkeypatch.setattr(preparing, "_to_cpu", lambda one: torch.zeros_like(one, device="cpu"))
    ready = prepare(model, ((torch.zeros(7, 16, device="meta"),), {}), "cpu")
    assert ready.notes == ("copied from meta, checked and timed on the CPU",)
    assert {str(one.device) for one in (*ready.model.parameters(), *ready.example[0])} == {"cpu"}
    assert {str(one.device) for one in model.parameters()} == {"meta"}


def test_a_changed_twin_keeps_ties_and_what_does_not_change() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4).half(), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].bias = model[2].bias
    model[0].register_buffer("again", model[0].weight.detach())
    twin: Any = make_twin(model, preparing.widened)
    assert twin[0].weight.dtype == torch.float32
    assert isinstance(twin[0].weight, nn.Parameter)
    assert twin[1].weight is model[1].weight
    assert twin[1].bias is twin[2].bias is model[2].bias
    assert model[0].weight.dtype == torch.float16


def test_what_is_not_exported(tmp_path: Path) -> None:
    model = OneLayer()
    model.gate.weight = nn.Parameter(torch.randn(5, 16).to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(moec.MoecError, match=r"MOEC503.*float8_e4m3fn"):
        moec.export(model, tmp_path / "m.onnx", (torch.randn(3, 16),))


def test_where_a_file_runs() -> None:
    from moec.backends.onnx.lower import region_model
    from moec.backends.onnx.providers import CPU, CUDA
    from tests.onnx.test_int8 import store
    from tests.passes.layers import mixtral_layer

    region = mixtral_layer("m", e=6, k=2, d=64, f=128, layout="concat", fn="silu", dtype="bf16")
    written = Written(region_model(region, store(region)), lambda x: x, (), [], {}, wide=lambda x: x)
    assert not written.runs_on((CPU,))
    assert written.runs_on((CUDA, CPU))


def test_the_plan_is_in_the_file(tmp_path: Path) -> None:
    moec.export(models.OneLayer().eval(), tmp_path / "m.onnx", (torch.randn(7, 16),), quantize="int8", target="cuda")
    properties = {one.key: one.value for one in onnx.load(str(tmp_path / "m.onnx")).metadata_props}
    (told,) = json.loads(properties["moec.plan"])
    assert told["layer"] == ""
    assert told["written as"].startswith("sorted rows")
    assert "not whole blocks of 64" in told["because"][0]
