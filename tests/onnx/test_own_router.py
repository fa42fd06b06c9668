"""Softmax routers left to ONNX Runtime's MoE and QMoE: what a graph must prove, and what is checked before.

T tokens, K experts per token, E experts, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch.nn.functional import softmax

import moec
from moec.backends.onnx.form import Form
from moec.backends.onnx.lower import region_model
from moec.backends.onnx.providers import CPU, why_no_cuda
from moec.backends.onnx.runtime import run, session
from moec.exporter import placed, probes
from moec.exporter.check import check_region
from moec.exporter.placed import with_router
from moec.exporter.routers import SoftmaxRouter, router_of
from moec.exporter.ways import optimised
from tests.onnx import models
from tests.onnx.test_int8 import store
from tests.passes.layers import mixtral_layer

Route = Callable[[torch.Tensor], Sequence[torch.Tensor]]
E, K = 6, 2


def over_sum(w: torch.Tensor) -> torch.Tensor:
    return w / w.sum(-1, keepdim=True)


def gathered(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ids = z.topk(K).indices
    return softmax(z, -1).gather(-1, ids), ids


def normalized(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    w, ids = softmax(z.float(), -1).topk(K)
    return over_sum(w).to(z.dtype), ids


def of_the_chosen(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    best, ids = z.topk(K)
    return softmax(best.float(), -1), ids


KNOWN: dict[str, tuple[Route, bool]] = {
    "plain": (lambda z: softmax(z, -1).topk(K), False),
    "normalized": (normalized, True),
    "of the chosen": (of_the_chosen, True),
    "gathered": (gathered, False),
    "gathered, normalized": (lambda z: (over_sum(gathered(z)[0]), gathered(z)[1]), True),
    "by sequences": (lambda z: tuple(t.flatten(0, 1) for t in softmax(z.unflatten(0, (1, -1)), -1).topk(K)), False),
}


def scaled(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    w, ids = softmax(z, -1).topk(K)
    return w * 2.5, ids


def with_bias(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    p = softmax(z, -1)
    ids = (p + torch.arange(E) / 10).topk(K).indices
    return p.gather(-1, ids), ids


def with_eps(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    w, ids = softmax(z, -1).topk(K)
    return w / (w.sum(-1, keepdim=True) + 1e-3), ids


def others_weights(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return softmax(-z, -1).topk(K)[0], softmax(z, -1).topk(K)[1]


def rounded(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    w, ids = softmax(z, -1).half().topk(K)
    return w.float(), ids


UNKNOWN: dict[str, Route] = {
    "scaled": scaled,
    "sigmoid": lambda z: z.sigmoid().topk(K),
    "bias": with_bias,
    "eps": with_eps,
    "the least": lambda z: softmax(z, -1).topk(K, largest=False),
    "over tokens": lambda z: softmax(z, 0).topk(K),
    "weights of other experts": others_weights,
    "rounded before the choice": rounded,
}


class Gate(torch.nn.Module):
    def __init__(self, route: Route, kind: torch.dtype) -> None:
        super().__init__()
        self.route, self.kind = route, kind

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = self.route(z.to(self.kind))
        return weights, ids


def exported(route: Route, kind: torch.dtype = torch.float32) -> Any:
    """The graph that torch's exporter writes for a router over z[T, E]."""
    z = torch.randn(5, E).to(kind)
    sizes = ({0: torch.export.Dim("T", min=2)},)
    program = torch.onnx.export(Gate(route, kind).eval(), (z,), dynamo=True, dynamic_shapes=sizes, verbose=False)
    return program.model.graph  # type: ignore[union-attr]


def proved(graph: Any, dtype: str = "f32") -> SoftmaxRouter | None:
    weights, ids = graph.outputs
    return router_of(ids, weights, E, dtype)


@pytest.mark.parametrize("name", KNOWN)
def test_routers_that_the_op_has(name: str) -> None:
    route, normalize = KNOWN[name]
    graph = exported(route)
    found = proved(graph)
    assert found is not None
    assert found.normalize == normalize
    assert found.logits is graph.inputs[0]


def test_logits_in_16_bits_are_found_in_front_of_their_cast() -> None:
    graph = exported(normalized, torch.float16)
    found = proved(graph, "f16")
    assert found is not None
    assert found.logits.dtype == ir.DataType.FLOAT16
    assert proved(graph, "f32") is None, "weights rounded to 16 bits are not those of a layer in fp32"


@pytest.mark.parametrize("name", UNKNOWN)
def test_routers_that_it_does_not_have(name: str) -> None:
    assert proved(exported(UNKNOWN[name])) is None


def test_a_softmax_in_16_bits_makes_ties_of_its_own() -> None:
    assert proved(exported(lambda z: softmax(z, -1).topk(K), torch.float16), "f16") is None


def layer(*, normalize: bool) -> Any:
    region = optimised(mixtral_layer("m", e=E, k=K, d=64, f=128, layout="concat", fn="silu"))
    return with_router(region, normalize, "f32")


def test_the_node_computes_router_and_experts() -> None:
    region = layer(normalize=True)
    weights = store(region)
    mine = session(region_model(region, weights, form=Form(experts="moe", router=True)))
    theirs = session(region_model(region, weights))
    assert [one.name for one in mine.get_inputs()] == ["x", "logits"]
    for tokens, scale in ((1, 1.0), (33, 0.05), (200, 8.0)):
        given = [torch.randn(tokens, 64), torch.randn(tokens, E) * scale]
        (a,), (b,) = run(mine, given), run(theirs, given)
        assert torch.allclose(a, b, atol=2e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_what_the_cpu_gets_wrong_is_seen(normalize: bool) -> None:
    """Its MoE takes the higher of equal experts."""
    region = layer(normalize=normalize)
    check = check_region(region, region, store(region), Form(experts="moe", router=True), 2e-6)
    assert check.why.startswith("equal logits: error")


def as_if_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placed, "why_no_cuda", lambda: "")
    monkeypatch.setattr(placed, "providers_of", lambda target: (CPU,))


def exported_layer(path: Path) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    model, x = models.OneLayer(dim=64, hidden=64).eval(), torch.randn(9, 64)
    return moec.export(model, path, (x,), target="cuda"), model, x


def test_a_provider_that_chooses_otherwise_is_handed_logarithms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_if_on_cuda(monkeypatch)
    report, _, _ = exported_layer(tmp_path / "m.onnx")
    (one,) = report.rewritten
    assert one.lowering == "MoE, fp32"
    assert one.tried[-1].startswith("MoE, fp32, with its own router: ")
    assert "Log" in {node.op_type for node in ir.load(tmp_path / "m.onnx").graph}


class Normalized(models.OneLayer):
    """The same with weights over their sum."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for e, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            token, slot = torch.where(chosen == e)
            out.index_add_(0, token, down(torch.relu(up(x[token]))) * weights[token, slot, None])
        return out


def test_a_provider_that_chooses_as_the_model_is_handed_the_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_if_on_cuda(monkeypatch)
    monkeypatch.setattr(probes, "_logits_probes", lambda region, generator: iter(()))  # ties, which the CPU turns over
    torch.manual_seed(0)
    model, x = Normalized(dim=64, hidden=64).eval(), torch.randn(9, 64)
    report = moec.export(model, tmp_path / "m.onnx", (x,), target="cuda")
    (one,) = report.rewritten
    assert one.lowering == "MoE, fp32, with its own router"
    kinds = {node.op_type for node in ir.load(tmp_path / "m.onnx").graph}
    assert "MoE" in kinds
    assert not kinds & {"Softmax", "TopK", "Log", "ScatterElements"}
    wide = torch.randn(40, 64)
    runtime = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (mine,) = runtime.run(None, {"x": wide.numpy()})
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(mine), model(wide), atol=2e-6)


def test_without_the_provider_it_cannot_be_checked(tmp_path: Path) -> None:
    if not why_no_cuda():
        pytest.skip("the CUDA provider loads here")
    report, _, _ = exported_layer(tmp_path / "m.onnx")
    (one,) = report.rewritten
    assert one.lowering == "MoE, fp32"
    assert one.tried == [
        "MoE, fp32, with its own router: its choice among equals can only be checked on the CUDA provider"
    ]


@pytest.mark.skipif(bool(why_no_cuda()), reason="the CUDA provider does not load here")
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("experts", ["moe", "qmoe"])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_on_cuda_it_chooses_as_the_model_does(dtype: str, experts: str, normalize: bool) -> None:
    if experts == "qmoe" and dtype == "f32":
        pytest.skip("QMoE computes in 16 bits there")
    region = optimised(mixtral_layer("m", e=E, k=K, d=128, f=128, dtype=dtype, layout="concat", fn="silu"))
    region = with_router(region, normalize, dtype)
    form = Form(experts=experts, router=True, cuda=experts == "qmoe")  # type: ignore[arg-type]
    from moec.backends.onnx.providers import providers_of

    check = check_region(region, region, store(region), form, 2e-6, providers_of("cuda"))
    assert check.passed, check.why
