"""moec.export of ONNX files: what other exporters write is recognised, proved and rewritten; all else is left alone."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper
from torch import nn

import moec
from moec.cli import main
from tests.onnx import written


def outputs(path: Path, feed: dict[str, Any]) -> list[Any]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, feed)  # type: ignore[no-any-return]


def check_rewritten(source: Path, tmp_path: Path, layers: int, feed: dict[str, Any]) -> moec.ExportReport:
    """Rewritten as sorted rows, and the same results at a size that moec did not try."""
    out = tmp_path / "out.onnx"
    report = moec.export(source, out)
    assert [layer.status for layer in report.layers if layer.kind == "moe"] == ["rewritten"] * layers
    assert report.routing_agreement in (1.0, None)  # nobody sees what an op chooses by itself
    nodes = onnx.load(str(out), load_external_data=False).graph.node
    assert sum("/expert_" in node.name for node in nodes) >= 2 * layers
    for mine, theirs in zip(outputs(out, feed), outputs(source, feed), strict=True):
        assert np.linalg.norm(mine - theirs) <= 2e-6 * np.linalg.norm(theirs)
    return report


def ids(batch: int, tokens: int) -> dict[str, Any]:
    return {"input_ids": np.random.default_rng(5).integers(3, 120, (batch, tokens))}


FAMILIES = [
    "mixtral",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3_moe", "deepseek_v3", "gpt_oss")),
]


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_that_gather_their_weights(name: str, tmp_path: Path) -> None:
    source = written.batched(name, tmp_path / "in.onnx")
    report = check_rewritten(source, tmp_path, 2, ids(4, 9))
    assert all(".layers." in layer.name and layer.name.endswith("experts") for layer in report.rewritten)
    fn = {"gpt_oss": "interleaved, clamped at 7"}.get(name, "silu, concat")
    assert all(fn in layer.evidence[1] for layer in report.rewritten)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_that_sort_their_rows_as_transformers_exports_them(name: str, tmp_path: Path) -> None:
    check_rewritten(written.grouped(name, tmp_path / "in"), tmp_path, 2, ids(4, 9))


def test_a_loop_over_experts_of_an_old_opset(tmp_path: Path) -> None:
    source = written.looped(tmp_path / "in.onnx")
    x = np.random.default_rng(1).standard_normal((23, 16)).astype(np.float32)
    report = check_rewritten(source, tmp_path, 1, {"x": x})
    assert report.opset == 18


def test_dense_experts(tmp_path: Path) -> None:
    source = written.dense(tmp_path / "in.onnx")
    x = np.random.default_rng(1).standard_normal((23, 16)).astype(np.float32)
    report = check_rewritten(source, tmp_path, 1, {"x": x})
    assert "gelu, concat" in report.layers[0].evidence[1]


@pytest.mark.parametrize("choices", [1, 2])
def test_experts_with_a_capacity(choices: int, tmp_path: Path) -> None:
    """40 tokens for 5 experts of 6 places: some are dropped, and dropped ones stay zero."""
    source = written.capacity(tmp_path / "in.onnx", choices)
    x = np.random.default_rng(1).standard_normal((40, 16)).astype(np.float32)
    report = check_rewritten(source, tmp_path, 1, {"x": x})
    assert "expert" in report.layers[0].evidence[-1]
    (y,) = outputs(tmp_path / "out.onnx", {"x": x})
    assert (np.abs(y).max(-1) == 0).any()


def test_weights_in_bfloat16_that_are_widened(tmp_path: Path) -> None:
    source = written.widened(tmp_path / "in.onnx")
    x = np.random.default_rng(1).standard_normal((23, 16)).astype(np.float32)
    check_rewritten(source, tmp_path, 1, {"x": x})


def test_a_file_in_16_bits(tmp_path: Path) -> None:
    source, out = written.half(tmp_path / "in.onnx"), tmp_path / "out.onnx"
    report = moec.export(source, out)
    assert [layer.status for layer in report.layers] == ["rewritten"]
    feed = {"x": np.random.default_rng(1).standard_normal((23, 16)).astype(np.float16)}
    (mine,), (theirs,) = outputs(out, feed), outputs(source, feed)
    assert mine.dtype == theirs.dtype
    assert np.linalg.norm((mine - theirs).astype(np.float32)) <= 4e-3 * np.linalg.norm(theirs.astype(np.float32))


class Plain(nn.Module):
    """A dense FFN behind a norm: x[T, 16] -> [T, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        y: torch.Tensor = x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))
        return y


def test_a_dense_ffn_is_rewritten_when_it_is_quantized(tmp_path: Path) -> None:
    source, out = written.by_torch(Plain(), torch.randn(7, 16), tmp_path / "in.onnx", "x"), tmp_path / "out.onnx"
    assert "unless it is quantized" in refused("MOEC705", source, out).message
    report = moec.export(source, out, quantize="int8")
    assert [(layer.kind, layer.status) for layer in report.layers] == [("ffn", "rewritten")]
    assert report.whole_model_error is not None
    assert 1e-5 < report.whole_model_error < 0.035


def test_int8_of_a_file(tmp_path: Path) -> None:
    source, out = written.dense(tmp_path / "in.onnx"), tmp_path / "out.onnx"
    report = moec.export(source, out, quantize="int8")
    assert report.whole_model_error is not None
    assert 1e-4 < report.whole_model_error < 0.035


def test_moecs_own_files_can_be_read(tmp_path: Path) -> None:
    from tests.onnx.models import OneLayer

    torch.manual_seed(0)
    moec.export(OneLayer().eval(), tmp_path / "in.onnx", (torch.randn(7, 16),))
    x = np.random.default_rng(1).standard_normal((23, 16)).astype(np.float32)
    check_rewritten(tmp_path / "in.onnx", tmp_path, 1, {"x": x})


class Attends(nn.Module):
    """A top-k that is no router: each token reads the two tokens it is most like. x[T, 16] -> [T, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, best = (x @ x.T).topk(2, -1)
        mixed = (x[best] * weights.softmax(-1).unsqueeze(-1)).sum(1)
        y: torch.Tensor = self.down(torch.relu(self.up(mixed)))
        return y


class Classifies(nn.Module):
    """An ArgMax at the end: x[T, 16] -> the best of 24 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.relu(self.up(x))).argmax(-1)
        return y


@pytest.mark.parametrize("model", [Attends(), Classifies()], ids=["top-k attention", "argmax"])
def test_near_misses_stay_as_they_are(model: nn.Module, tmp_path: Path) -> None:
    source = written.by_torch(model, torch.randn(7, 16), tmp_path / "in.onnx", "x")
    before = set(tmp_path.iterdir())
    with pytest.raises(moec.MoecError) as caught:
        moec.export(source, tmp_path / "out.onnx")
    assert caught.value.code == "MOEC705"
    assert set(tmp_path.iterdir()) == before


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written.dense(tmp_path_factory.mktemp("read") / "in.onnx")


def refused(code: str, source: Path, out: Path, **options: Any) -> moec.MoecError:
    with pytest.raises(moec.MoecError) as caught:
        moec.export(source, out, **options)
    assert caught.value.code == code, caught.value
    return caught.value


def test_files_that_cannot_be_read(file: Path, tmp_path: Path) -> None:
    refused("MOEC601", tmp_path / "none.onnx", tmp_path / "out.onnx")
    refused("MOEC209", tmp_path / "model.pt", tmp_path / "out.onnx")
    refused("MOEC706", file, file)
    for name, data in (("text", b"not a model"), ("empty", b""), ("half", file.read_bytes()[:3000])):
        damaged = tmp_path / f"{name}.onnx"
        damaged.write_bytes(data)
        refused("MOEC707", damaged, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_weights_that_are_missing_or_elsewhere(tmp_path: Path) -> None:
    from tests.onnx.models import OneLayer

    source = tmp_path / "in.onnx"
    moec.export(OneLayer(hidden=96).eval(), source, (torch.randn(7, 16),), external_data=True)
    data = tmp_path / "in.onnx.data"
    data.write_bytes(data.read_bytes()[:100])
    assert "cut off" in refused("MOEC707", source, tmp_path / "out.onnx").message
    data.unlink()
    assert "missing" in refused("MOEC707", source, tmp_path / "out.onnx").message
    model = onnx.load(str(source), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../outside.data"
    onnx.save(model, str(source))
    assert "outside its folder" in refused("MOEC707", source, tmp_path / "out.onnx").message


def test_damaged_files_are_refused_with_a_code(file: Path, tmp_path: Path) -> None:
    """Whatever is flipped, the answer is a file that was checked, or one clear error."""
    whole = bytearray(file.read_bytes())
    random = np.random.default_rng(0)
    for round_ in range(12):
        damaged = bytearray(whole)
        for place in random.integers(0, len(whole), 4):
            damaged[place] = int(random.integers(0, 256))
        source = tmp_path / f"{round_}.onnx"
        source.write_bytes(damaged)
        with contextlib.suppress(moec.MoecError):
            moec.export(source, tmp_path / f"{round_}.out.onnx")


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of these tests count as large."""
    monkeypatch.setattr("moec.frontends.onnx.load.LARGE", 1000)
    monkeypatch.setattr("moec.frontends.onnx.wire.SMALL", 1000)
    monkeypatch.setattr("moec.frontends.onnx.home.SMALL", 1000)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("beside", [None, True])
def test_weights_of_a_large_file_stay_in_files(beside: bool | None, file: Path, tmp_path: Path) -> None:
    import onnx_ir

    from moec.frontends.onnx.load import load

    model, home = load(file)
    assert home is not None
    held = {name: value.const_value for name, value in model.graph.initializers.items()}
    assert isinstance(held["up"], onnx_ir.ExternalTensor)
    assert held["up"].offset % 4096 == 0
    x = {"x": np.random.default_rng(1).standard_normal((23, 16)).astype(np.float32)}
    report = moec.export(file, tmp_path / "out.onnx", external_data=beside)
    assert report.load_seconds is not None
    assert np.allclose(outputs(tmp_path / "out.onnx", x)[0], outputs(file, x)[0], atol=1e-5)
    onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)
    assert len(list(tmp_path.iterdir())) == (2 if beside else 1)


@pytest.mark.usefixtures("large")
def test_weights_beside_a_large_file(file: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.onnx"
    onnx.save(onnx.load(str(file)), str(source), save_as_external_data=True, location="w.data", size_threshold=100)
    source.write_bytes(source.read_bytes())
    moec.export(source, tmp_path / "out.onnx")
    x = {"x": np.random.default_rng(1).standard_normal((23, 16)).astype(np.float32)}
    assert np.allclose(outputs(tmp_path / "out.onnx", x)[0], outputs(source, x)[0], atol=1e-5)


@pytest.mark.usefixtures("large")
def test_a_large_file_that_is_damaged(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    for size in (1500, len(whole) // 2, len(whole) - 1):
        (tmp_path / "in.onnx").write_bytes(whole[:size])
        refused("MOEC707", tmp_path / "in.onnx", tmp_path / "out.onnx")


@pytest.mark.usefixtures("large")
def test_no_room_for_the_weights_of_a_large_file(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moec.frontends.onnx.home.split", full)
    assert "No space left" in refused("MOEC607", file, tmp_path / "out.onnx").message
    assert not (tmp_path / "out.onnx").exists()


def test_inputs_from_a_file(file: Path, tmp_path: Path) -> None:
    given = tmp_path / "inputs.npz"
    np.savez(given, y=np.zeros((3, 16), np.float32))
    assert "no array called x" in refused("MOEC708", file, tmp_path / "out.onnx", inputs=given).message
    np.savez(given, x=np.random.default_rng(0).standard_normal((30, 16)).astype(np.float32))
    assert moec.export(file, tmp_path / "out.onnx", inputs=given).whole_model_shapes == ["inputs.npz"]


def test_inputs_that_cannot_be_made_up(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", "m"])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    shape = helper.make_tensor("shape", onnx.TensorProto.INT64, [2], [7, 11])
    node = helper.make_node("Reshape", ["x", "shape"], ["y"])
    graph = helper.make_graph([node], "g", [x], [y], [shape])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "in.onnx")
    assert "--inputs" in str(refused("MOEC708", tmp_path / "in.onnx", tmp_path / "out.onnx"))


def edited(file: Path, path: Path, change: Any) -> Path:
    model = onnx.load(str(file))
    change(model)
    onnx.save(model, str(path))
    return path


def test_an_unknown_opset_or_domain(file: Path, tmp_path: Path) -> None:
    def newer(model: Any) -> None:
        model.opset_import[0].version = 99

    def elsewhere(model: Any) -> None:
        model.graph.node[0].domain = "nobody.knows"
        model.opset_import.append(helper.make_opsetid("nobody.knows", 1))

    for name, change in (("99", newer), ("nobody", elsewhere)):
        source = edited(file, tmp_path / f"{name}.onnx", change)
        assert name in refused("MOEC707", source, tmp_path / "out.onnx").message


def test_dynamic_sizes_without_a_name(file: Path, tmp_path: Path) -> None:
    def nameless(model: Any) -> None:
        model.graph.input[0].type.tensor_type.shape.dim[0].Clear()

    source = edited(file, tmp_path / "in.onnx", nameless)
    x = np.random.default_rng(1).standard_normal((23, 16)).astype(np.float32)
    check_rewritten(source, tmp_path, 1, {"x": x})


def test_an_op_that_the_checker_does_not_know_is_noted(file: Path, tmp_path: Path) -> None:
    def normed(model: Any) -> None:
        model.graph.initializer.append(helper.make_tensor("ones", onnx.TensorProto.FLOAT, [16], [1.0] * 16))
        node = helper.make_node("SimplifiedLayerNormalization", ["x", "ones"], ["normed"], axis=-1, epsilon=1e-5)
        for one in model.graph.node:
            one.input[:] = ["normed" if name == "x" else name for name in one.input]
        model.graph.node.insert(0, node)

    source = edited(file, tmp_path / "in.onnx", normed)
    report = moec.export(source, tmp_path / "out.onnx")
    assert any("SimplifiedLayerNormalization" in note for note in report.notes)


def test_a_choice_within_a_graph_of_a_node_is_named(tmp_path: Path) -> None:
    topk = helper.make_node("TopK", ["x", "k"], ["best", "ids"], name="inner")
    best = helper.make_tensor_value_info("best", onnx.TensorProto.FLOAT, None)
    same = helper.make_node("Identity", ["x"], ["other"])
    other = helper.make_tensor_value_info("other", onnx.TensorProto.FLOAT, None)
    branches = {
        "then_branch": helper.make_graph([topk], "then", [], [best]),
        "else_branch": helper.make_graph([same], "else", [], [other]),
    }
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["yes"]),
        helper.make_node("If", ["yes"], ["y"], **branches),
    ]
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 16])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    held = [
        helper.make_tensor("k", onnx.TensorProto.INT64, [1], [2]),
        helper.make_tensor("zero", onnx.TensorProto.FLOAT, [], [0.0]),
    ]
    graph = helper.make_graph(nodes, "g", [x], [y], held)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "in.onnx")
    message = refused("MOEC705", tmp_path / "in.onnx", tmp_path / "out.onnx").message
    assert "inner: it is in a graph of If" in message


@pytest.mark.slow
def test_any_damage_is_refused_with_a_code_or_does_no_harm(file: Path, tmp_path: Path) -> None:
    """Cut off at any place, or with some bits turned; large files are taken apart by moec's own reader."""
    whole, random = file.read_bytes(), np.random.default_rng(1)
    for round_ in range(60):
        damaged = bytearray(whole[: int(random.integers(0, len(whole)))] if round_ % 2 else whole)
        for place in random.integers(0, max(1, len(damaged)), 3) if damaged else []:
            damaged[place] ^= 1 << int(random.integers(0, 8))
        source = tmp_path / f"{round_}.onnx"
        source.write_bytes(damaged)
        with contextlib.suppress(moec.MoecError), pytest.MonkeyPatch.context() as patch:
            if round_ % 4 > 1:
                patch.setattr("moec.frontends.onnx.load.LARGE", 1000)
                patch.setattr("moec.frontends.onnx.wire.SMALL", 1000)
            moec.export(source, tmp_path / f"{round_}.out.onnx")


def test_the_command(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(file), "-o", str(tmp_path / "out.onnx")]) == 0
    assert "1 of 1 layers rewritten" in capsys.readouterr().out
    assert main(["export", str(file), "-o", str(file)]) == 1
    assert "MOEC706" in capsys.readouterr().err


def test_a_slower_form_is_not_written(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("export", "slower"):
        monkeypatch.setattr(f"moec.exporter.{module}.SLOWER", 0.0)
    error = refused("MOEC705", file, tmp_path / "out.onnx", tokens=[4], seconds=0.0)
    assert "can be rewritten" in error.message
    assert "it would be slower" in error.message
    monkeypatch.setattr("moec.exporter.slower.SLOWER", 1e9)
    error = refused("MOEC705", file, tmp_path / "out.onnx", tokens=[4], seconds=0.0)
    assert "the rewritten file would be slower" in error.message
    assert main(["export", str(file), "-o", str(tmp_path / "out.onnx"), "--tokens", "4", "--seconds", "0"]) == 4
    assert not (tmp_path / "out.onnx").exists()


class Two(nn.Module):
    """Two layers, one after the other: x[T, 16] -> [T, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = written.Dense(), written.Capacity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x + self.first(x)
        y: torch.Tensor = h + self.second(h)
        return y


def test_a_layer_that_would_be_slower_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    source = written.by_torch(Two(), torch.randn(7, 16), tmp_path / "in.onnx", "x")
    found = iter(["slower", ""])
    monkeypatch.setattr("moec.exporter.export._time_both", lambda *args: next(found))
    told = iter(["it would be slower: 2 ms instead of 1 at 4 tokens", ""])
    monkeypatch.setattr("moec.exporter.onnx_file.slower_alone", lambda *args: next(told))
    report = moec.export(source, tmp_path / "out.onnx", tokens=[4])
    assert [layer.status for layer in report.layers] == ["left alone", "rewritten"]
    assert report.layers[0].reason.startswith("it would be slower")
    x = {"x": np.random.default_rng(1).standard_normal((23, 16)).astype(np.float32)}
    assert np.allclose(outputs(tmp_path / "out.onnx", x)[0], outputs(source, x)[0], atol=1e-5)


@pytest.mark.parametrize("form", ["slots", "places", "logits"])
def test_a_layer_is_timed_alone_beside_its_own_nodes(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.onnx.own_ops import moe_file

    source = {
        "slots": lambda: written.dense(tmp_path / "in.onnx"),
        "places": lambda: written.capacity(tmp_path / "in.onnx"),
        "logits": lambda: moe_file(tmp_path / "in.onnx", activation_type="relu", normalize_routing_weights=1),
    }[form]()
    monkeypatch.setattr("moec.exporter.export.SLOWER", 0.0)
    monkeypatch.setattr("moec.exporter.slower.SLOWER", 0.0)
    assert "ms instead of" in refused("MOEC705", source, tmp_path / "out.onnx", tokens=[1, 4], seconds=0.0).message
