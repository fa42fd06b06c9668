"""Files that cannot be read, and inputs that cannot be made up: one clear error, and nothing written."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

import moec
from tests.onnx.reading import check_rewritten, refused


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
    assert (
        "inner: within the then_branch of If node_2: nothing that is computed from the choice comes together" in message
    )


def test_a_weight_of_an_unknown_type(file: Path, tmp_path: Path) -> None:
    model = onnx.load(str(file))
    model.graph.initializer[0].data_type = 0
    (tmp_path / "in.onnx").write_bytes(model.SerializeToString())
    refused("MOEC707", tmp_path / "in.onnx", tmp_path / "out.onnx")


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
