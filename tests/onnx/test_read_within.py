"""Layers in the graphs that nodes run are read and rewritten there, or left with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

import moec
from tests.onnx import within, written
from tests.onnx.reading import outputs, refused


@pytest.fixture(scope="module")
def branches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return within.branches(tmp_path_factory.mktemp("within") / "branches.onnx")


@pytest.fixture(scope="module")
def turns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return within.turns(tmp_path_factory.mktemp("within") / "turns.onnx")


def x_of(tokens: int, shift: float = 0.0) -> dict[str, Any]:
    return {"x": np.random.default_rng(1).standard_normal((tokens, 16)).astype(np.float32) + np.float32(shift)}


def check_same(source: Path, out: Path, *feeds: dict[str, Any]) -> None:
    onnx.checker.check_model(str(out), full_check=True)
    for feed in feeds:
        for mine, theirs in zip(outputs(out, feed), outputs(source, feed), strict=True):
            assert np.linalg.norm(mine - theirs) <= 2e-6 * np.linalg.norm(theirs)


def nodes_of(graph: Any) -> list[Any]:
    """All nodes, those of inner graphs too."""
    inner = (attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g"))
    return [*graph.node, *(node for one in inner for node in nodes_of(one))]


def check_held_once(path: Path) -> None:
    """Weights that are not read any more are gone, and those of one layer stand at the top."""
    graph = onnx.load(str(path)).graph
    read = {name for node in nodes_of(graph) for name in node.input}
    assert {tensor.name for tensor in graph.initializer} <= read
    inner = [a.g for node in nodes_of(graph) for a in node.attribute if a.HasField("g")]
    assert not any(one.initializer for one in inner)


def test_one_module_in_both_branches(branches: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    report = moec.export(branches, out)
    assert [layer.status for layer in report.layers] == ["rewritten"] * 2
    assert len({layer.name for layer in report.layers}) == 2
    said = " ".join(layer.evidence[-1] for layer in report.layers)
    assert "then_branch of If" in said
    assert "else_branch of If" in said
    check_same(branches, out, x_of(23, 2.0), x_of(23, -2.0), x_of(1, 2.0))
    check_held_once(out)


def test_a_branch_that_no_run_takes_is_said_so(branches: Path, tmp_path: Path) -> None:
    given = tmp_path / "in.npz"
    np.savez(given, **x_of(30, 2.0))
    report = moec.export(branches, tmp_path / "out.onnx", inputs=given)
    assert [("no run takes" in layer.evidence[-1]) for layer in report.layers] == [False, True]
    check_same(branches, tmp_path / "out.onnx", x_of(23, 2.0), x_of(23, -2.0))


def test_a_loop_beside_a_layer(turns: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    report = moec.export(turns, out)
    assert [layer.status for layer in report.layers] == ["rewritten"] * 2
    assert "within the body of Loop" in report.layers[1].evidence[-1]
    assert report.routing_agreement == 1.0
    assert report.whole_model_error is not None
    assert 0 < report.whole_model_error < 1e-5
    check_held_once(out)
    check_same(turns, out, x_of(23), x_of(1))


def test_int8_within_a_loop(turns: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    report = moec.export(turns, out, quantize="int8")
    assert len(report.rewritten) == 2
    (mine,), (theirs,) = outputs(out, x_of(23)), outputs(turns, x_of(23))
    assert 1e-4 < np.linalg.norm(mine - theirs) / np.linalg.norm(theirs) < 0.1


def test_branches_within_a_loop(branches: Path, tmp_path: Path) -> None:
    source, out = run_by("Loop", branches, tmp_path / "in.onnx"), tmp_path / "out.onnx"
    report = moec.export(source, out)
    assert [layer.status for layer in report.layers] == ["rewritten"] * 2
    assert all("_branch of If" in layer.evidence[-1] for layer in report.layers)
    check_held_once(out)
    check_same(
        source, out, *({"x_in": x_of(tokens, shift)["x"]} for tokens, shift in ((23, 2.0), (23, -2.0), (1, 2.0)))
    )


def test_a_branch_that_is_wrong_is_not_written(branches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs of nodes are held to what they were, also where no run of the file goes through them."""
    from moec.exporter.routed import region_inputs

    def shifted(emit: Any, layer: Any) -> list[Any]:
        x, ids, weights = region_inputs(emit, layer)
        return [x, ids, emit.op("Mul", weights, emit.scalar(1.001, "f32"))]

    monkeypatch.setattr("moec.exporter.place_layer.region_inputs", shifted)
    assert "_branch of If" in refused("MOEC704", branches, tmp_path / "out.onnx").message
    assert not (tmp_path / "out.onnx").exists()


def test_a_scan_of_fixed_sizes(tmp_path: Path) -> None:
    source, out = within.steps(tmp_path / "in.onnx"), tmp_path / "out.onnx"
    report = moec.export(source, out)
    assert [layer.status for layer in report.layers] == ["rewritten"]
    assert "within the body of Scan" in report.layers[0].evidence[-1]
    random = np.random.default_rng(1)
    shapes = {"xs": (4, 7, 16), "state": (7, 16)}
    check_same(source, out, {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()})


@pytest.mark.parametrize("model", ["Guarded", "Counted"])
def test_experts_behind_an_if_or_in_a_loop(model: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source, out = within.scripted(getattr(within, model)(), tmp_path / "in.onnx"), tmp_path / "out.onnx"
    assert {"If", "Loop"} & {node.op_type for node in onnx.load(str(source)).graph.node}
    report = moec.export(source, out)
    assert [layer.status for layer in report.layers] == ["rewritten"]
    check_same(source, out, x_of(23), x_of(1))
    assert not {"If", "Loop"} & {node.op_type for node in onnx.load(str(out)).graph.node}
    check_held_once(out)


def run_by(kind: str, source: Path, path: Path, **edits: Any) -> Path:
    """A file's whole graph as the body of a node, which no exporter writes so; its weights stay in the body."""
    model = onnx.load(str(source))
    inner = model.graph
    x, y = inner.input[0], inner.output[0]
    outer = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 16]) for name in ("x_in", "y_out")]
    if kind == "Loop":
        number = helper.make_tensor_value_info("number", onnx.TensorProto.INT64, [])
        further = helper.make_tensor_value_info("further", onnx.TensorProto.BOOL, [])
        still = helper.make_tensor_value_info("still", onnx.TensorProto.BOOL, [])
        inner.node.append(helper.make_node("Identity", ["further"], ["still"]))
        del inner.input[:], inner.output[:]
        inner.input.extend([number, further, x])
        inner.output.extend([still, y])
        turns = numpy_helper.from_array(np.array(edits.get("turns", 2), np.int64), "turns")
        nodes, held = [helper.make_node("Loop", ["turns", "", "x_in"], ["y_out"], name="loop", body=inner)], [turns]
    else:
        sequence = helper.make_node("SequenceConstruct", ["x_in"], ["xs"])
        mapped = helper.make_node("SequenceMap", ["xs"], ["ys"], name="map", body=inner)
        zero = numpy_helper.from_array(np.array(0, np.int64), "zero")
        nodes, held = [sequence, mapped, helper.make_node("SequenceAt", ["ys", "zero"], ["y_out"])], [zero]
    graph = helper.make_graph(nodes, "g", outer[:1], outer[1:], held)
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def test_a_body_that_holds_its_weights(file: Path, tmp_path: Path) -> None:
    source, out = run_by("Loop", file, tmp_path / "in.onnx"), tmp_path / "out.onnx"
    report = moec.export(source, out)
    assert "within the body of Loop loop" in report.layers[0].evidence[-1]
    feed = {"x_in": x_of(23)["x"]}
    check_same(source, out, feed)
    check_held_once(out)


def test_weights_that_are_turned_outside_of_the_body(file: Path, tmp_path: Path) -> None:
    source, out = run_by("Loop", file, tmp_path / "in.onnx"), tmp_path / "out.onnx"
    model = onnx.load(str(source))
    body = model.graph.node[0].attribute[0].g
    (up,) = [tensor for tensor in body.initializer if tensor.name == "up"]
    body.initializer.remove(up)
    turned = np.ascontiguousarray(numpy_helper.to_array(up).transpose(2, 1, 0))
    model.graph.initializer.append(numpy_helper.from_array(turned, "turned"))
    model.graph.node.insert(0, helper.make_node("Transpose", ["turned"], ["up"], perm=[2, 1, 0]))
    onnx.save(model, str(source))
    moec.export(source, out)
    check_same(source, out, {"x_in": x_of(23)["x"]})
    check_held_once(out)


def test_a_body_that_no_run_goes_through_stays(file: Path, tmp_path: Path) -> None:
    source = run_by("Loop", file, tmp_path / "in.onnx", turns=0)
    message = refused("MOEC705", source, tmp_path / "out.onnx").message
    assert "within the body of Loop loop: no run of the file goes through it" in message


def test_graphs_of_other_nodes_stay(file: Path, tmp_path: Path) -> None:
    source = run_by("SequenceMap", file, tmp_path / "in.onnx")
    message = refused("MOEC705", source, tmp_path / "out.onnx").message
    assert "it is in a graph of SequenceMap, which is not read" in message


def test_a_file_of_fixed_sizes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with written.quiet():
        program = torch.onnx.export(written.Dense().eval(), (torch.randn(7, 16),), dynamo=True, verbose=False)
        assert program is not None
        program.save(tmp_path / "in.onnx")
    report = moec.export(tmp_path / "in.onnx", tmp_path / "out.onnx")
    assert [layer.status for layer in report.layers] == ["rewritten"]
    check_same(tmp_path / "in.onnx", tmp_path / "out.onnx", x_of(7))


def test_bodies_of_large_files(branches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moec.frontends.onnx.load.LARGE", 1000)
    monkeypatch.setattr("moec.frontends.onnx.wire.SMALL", 1000)
    monkeypatch.setattr("moec.frontends.onnx.home.SMALL", 1000)
    assert len(moec.export(branches, tmp_path / "out.onnx").rewritten) == 2
    check_same(branches, tmp_path / "out.onnx", x_of(23, 2.0), x_of(23, -2.0))


def test_weights_of_a_body_beside_the_file(file: Path, tmp_path: Path) -> None:
    source = run_by("Loop", file, tmp_path / "in.onnx")
    model = onnx.load(str(source))
    (up,) = [tensor for tensor in model.graph.node[0].attribute[0].g.initializer if tensor.name == "up"]
    (tmp_path / "up.data").write_bytes(up.raw_data)
    onnx.external_data_helper.set_external_data(up, "up.data", 0, len(up.raw_data))
    up.ClearField("raw_data")
    source.write_bytes(model.SerializeToString())
    moec.export(source, tmp_path / "out.onnx")
    check_same(run_by("Loop", file, tmp_path / "whole.onnx"), tmp_path / "out.onnx", {"x_in": x_of(23)["x"]})
    up.external_data[0].value = "../up.data"
    source.write_bytes(model.SerializeToString())
    assert "outside its folder" in refused("MOEC707", source, tmp_path / "out.onnx").message


def test_a_body_that_reads_a_sequence_and_gives_one(file: Path, tmp_path: Path) -> None:
    """Sequences are handed over as they are, and compared element by element."""
    source, out = run_by("Loop", file, tmp_path / "in.onnx"), tmp_path / "out.onnx"
    model = onnx.load(str(source))
    body = model.graph.node[0].attribute[0].g
    rows = onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, ["n", 16])
    listed = helper.make_value_info("listed", helper.make_sequence_type_proto(rows))
    kept = helper.make_value_info("kept", helper.make_sequence_type_proto(rows))
    body.node.append(helper.make_node("SequenceInsert", ["listed", body.output[1].name], ["kept"]))
    body.node.insert(0, helper.make_node("SequenceAt", ["around", "turns"], ["again"]))
    body.node.insert(1, helper.make_node("Add", ["again", body.input[2].name], ["sum"]))
    for node in body.node[2:]:
        node.input[:] = ["sum" if name == body.input[2].name else name for name in node.input]
    body.input.append(listed)
    body.output.append(kept)
    model.graph.node.insert(0, helper.make_node("SequenceConstruct", ["x_in", "x_in", "x_in"], ["around"]))
    model.graph.node.insert(1, helper.make_node("SequenceEmpty", [], ["none"]))
    loop = model.graph.node[2]
    loop.input.append("none")
    loop.output.append("all")
    model.graph.output.append(helper.make_value_info("all", helper.make_sequence_type_proto(rows)))
    onnx.save(model, str(source))
    report = moec.export(source, out)
    assert "within the body of Loop" in report.layers[0].evidence[-1]
    (y, listed_rows), (like, like_rows) = (
        outputs(out, {"x_in": x_of(23)["x"]}),
        outputs(source, {"x_in": x_of(23)["x"]}),
    )
    for mine, theirs in zip([y, *listed_rows], [like, *like_rows], strict=True):
        assert np.linalg.norm(mine - theirs) <= 2e-6 * np.linalg.norm(theirs)
