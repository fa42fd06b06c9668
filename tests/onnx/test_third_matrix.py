"""`MoE` nodes with a third matrix, as transformers' exporter writes them for CUDA. T tokens, E experts, D, F widths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import moec
from tests.onnx import models, written
from tests.onnx.reading import outputs, refused

E, D, F, K = 4, 32, 24, 2
KINDS = {"f32": (TensorProto.FLOAT, np.float32), "f16": (TensorProto.FLOAT16, np.float16)}


def tensors(*, bias: bool) -> dict[str, Any]:
    random = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"gate": (D, E), "w1": (E, F, D), "w2": (E, D, F), "w3": (E, F, D)}
    shapes |= {"b1": (E, F), "b2": (E, D), "b3": (E, F)} if bias else {}
    return {
        name: (random.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32) for name, shape in shapes.items()
    }


def file(path: Path, *, bias: bool = False, kind: str = "f32", op: str = "MoE", **attributes: Any) -> Path:
    """x[B, S, D] -> logits -> the node -> y."""
    element, dtype = KINDS[kind]
    held = {name: one.astype(dtype) for name, one in tensors(bias=bias).items()} | {"flat": np.array([-1, E], np.int64)}
    b1, b2, b3 = ("b1", "b2", "b3") if bias else ("", "", "")
    names = {"MoE": ["x", "logits", "w1", b1, "w2", b2, "w3", b3]}
    names["QMoE"] = ["x", "logits", "w1", "s", "", "w2", "s", "", "w3", "s", ""]
    if op == "QMoE":
        held |= {"s": np.ones((E, 1), dtype)}
    nodes = [
        helper.make_node("MatMul", ["x", "gate"], ["scores"], name="router"),
        helper.make_node("Reshape", ["scores", "flat"], ["logits"], name="flat"),
        helper.make_node(op, names[op], ["m"], name="experts", domain="com.microsoft", k=K, **attributes),
        helper.make_node("Add", ["m", "x"], ["y"], name="out"),
    ]
    sizes = ["batch", "sequence", D]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", element, sizes)],
        [helper.make_tensor_value_info("y", element, sizes)],
        [numpy_helper.from_array(array, name) for name, array in held.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def expected(x: Any, act: Any, *, bias: bool = False, normalize: bool = True, shift: float = 0.0) -> Any:
    """By the documentation, in float64, one token after the other."""
    held = {name: one.astype(np.float64) for name, one in tensors(bias=bias).items()}
    zero = {"b1": np.zeros((E, F)), "b2": np.zeros((E, D)), "b3": np.zeros((E, F))}
    held = zero | held
    y = x.astype(np.float64).copy()
    for row in y.reshape(-1, D):
        given = row.copy()
        logits = given @ held["gate"]
        best = np.argsort(-logits)[:K]
        p = np.exp(logits - logits.max())
        weights = p[best] / (p[best].sum() if normalize else p.sum())
        for e, weight in zip(best, weights, strict=True):
            gate, up = held["w1"][e] @ given + held["b1"][e], held["w3"][e] @ given + held["b3"][e]
            row[:] += weight * (held["w2"][e] @ (act(gate) * (up + shift)) + held["b2"][e])
    return y


def silu(x: Any, alpha: float = 1.0) -> Any:
    return x / (1 + np.exp(-alpha * x))


X = np.random.default_rng(1).standard_normal((2, 9, D)).astype(np.float32)


@pytest.mark.parametrize(
    ("attributes", "act", "options"),
    [
        ({"activation_type": "silu"}, silu, {"normalize": False}),
        ({"activation_type": "silu", "normalize_routing_weights": 1}, silu, {"bias": True}),
        (
            {
                "activation_type": "swiglu",
                "activation_alpha": 1.702,
                "activation_beta": 1.0,
                "normalize_routing_weights": 1,
            },
            lambda x: silu(x, 1.702),
            {"shift": 1.0},
        ),
    ],
    ids=["silu", "bias", "swiglu"],
)
def test_it_is_rewritten_as_documented(attributes: Any, act: Any, options: Any, tmp_path: Path) -> None:
    bias = options.get("bias", False)
    source = file(tmp_path / "in.onnx", bias=bias, **attributes)
    report = moec.export(source, tmp_path / "out.onnx", target="portable", tokens=[4])
    assert [layer.status for layer in report.layers] == ["rewritten"], report
    (mine,) = outputs(tmp_path / "out.onnx", {"x": X})
    theirs = expected(X, act, **options)
    assert np.linalg.norm(mine - theirs) <= 2e-6 * np.linalg.norm(theirs)
    held = onnx.load(str(tmp_path / "out.onnx"))
    assert {node.domain for node in held.graph.node} == {""}
    assert not any("written_out/fc" in node.name for node in held.graph.node)
    assert "MoE nodes with a third matrix" in report.checked_as
    properties = {one.key: one.value for one in held.metadata_props}
    assert "which ONNX Runtime does not run on the CPU" in properties["moec.verification"]
    assert "not timed: the file as it was does not run here" in report.notes
    assert report.latency == []


def test_in_fp16(tmp_path: Path) -> None:
    source = file(tmp_path / "in.onnx", kind="f16", activation_type="silu", normalize_routing_weights=1)
    report = moec.export(source, tmp_path / "out.onnx")
    assert [layer.status for layer in report.layers] == ["rewritten"], report
    (mine,) = outputs(tmp_path / "out.onnx", {"x": X.astype(np.float16)})
    theirs = expected(X.astype(np.float16), silu)
    assert np.linalg.norm(mine - theirs) <= 4e-3 * np.linalg.norm(theirs)


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"activation_type": "gelu"}, "which gelu"),
        ({"activation_type": "silu", "use_sparse_mixer": 1}, "use_sparse_mixer"),
        ({"activation_type": "swiglu", "swiglu_fusion": 1}, "swiglu_fusion as well"),
        ({"activation_type": "silu", "op": "QMoE"}, "unquantized weights alone"),
    ],
    ids=lambda value: "" if isinstance(value, str) else value.get("op", value["activation_type"]),
)
def test_what_the_documentation_does_not_say(attributes: Any, reason: str, tmp_path: Path) -> None:
    message = refused("MOEC707", file(tmp_path / "in.onnx", **attributes), tmp_path / "out.onnx").message
    assert "experts is a " in message
    assert "with a third matrix" in message
    assert reason in message


def test_a_node_that_is_not_rewritten_stays_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer is enough for a file, but not where others would be left computing all experts."""
    source = file(tmp_path / "in.onnx", activation_type="silu")
    monkeypatch.setattr("moec.exporter.onnx_file.GraphRewriter.rewrite", lambda *args: 1)
    assert "rewritten all or none" in refused("MOEC705", source, tmp_path / "out.onnx").message


@pytest.mark.slow
def test_what_transformers_exports_for_cuda(tmp_path: Path) -> None:
    import torch

    pytest.importorskip("transformers.exporters")
    from transformers.exporters import OnnxConfig, OnnxExporter

    model = models.model("mixtral")
    given = {"input_ids": models.inputs("mixtral")["input_ids"]}
    with written.quiet():
        exported = OnnxExporter().export(model, given, config=OnnxConfig(dynamic=True, ort_fusions="cuda"))
        exported.save_pretrained(tmp_path / "in")
    source = tmp_path / "in" / "model.onnx"
    kinds = [node.op_type for node in onnx.load(str(source), load_external_data=False).graph.node]
    if "MoE" not in kinds:
        pytest.skip(f"this transformers fuses no MoE: {sorted(set(kinds))}")
    report = moec.export(source, tmp_path / "out.onnx", target="cpu")
    assert [layer.status for layer in report.layers if layer.kind == "moe"] == ["rewritten"] * 2, report
    ids = torch.randint(3, 120, (2, 9))
    with torch.no_grad():
        theirs = model(input_ids=ids, use_cache=False).logits.numpy()
    session_feed = {"input_ids": ids.numpy()}
    (mine, *_) = outputs(tmp_path / "out.onnx", session_feed)
    assert np.linalg.norm(mine - theirs) <= 2e-6 * np.linalg.norm(theirs)
