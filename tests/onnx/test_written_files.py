"""What appears where a file was asked for, and what does not: exit statuses, full disks, long files and large ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

import moec
from moec.bench import Effort
from moec.cli import main
from moec.exporter import choose
from moec.exporter.check import Check
from moec.verify import FP32_BAR
from tests.onnx.models import OneLayer
from tests.onnx.reading import outputs, refused

WRONG = Check(why="7 tokens: error 1.0e+00 above 2e-06", labels=["7 tokens"])
FACTORY = """
import torch
from tests.onnx.models import OneLayer

def build():
    return OneLayer(), lambda tokens: torch.randn(tokens, 16)
"""


@pytest.mark.parametrize("source", ["a module", "a file"])
def test_a_failed_check_is_exit_status_3(
    source: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = str(file)
    if source == "a module":
        (tmp_path / "mine.py").write_text(FACTORY, encoding="utf-8")
        given = f"{tmp_path / 'mine.py'}:build"
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("moec.exporter.lowerings.check_region", lambda *args: WRONG)
    assert main(["export", given, "-o", str(tmp_path / "out" / "out.onnx")]) == 3
    assert "MOEC704" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_what_stood_there_survives_a_full_disk(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        args[1].write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    out = tmp_path / "out.onnx"
    out.write_bytes(b"what stood there")
    monkeypatch.setattr("onnx_ir.save", full)
    refused("MOEC607", file, out)
    assert out.read_bytes() == b"what stood there"
    assert list(tmp_path.iterdir()) == [out]


def test_weights_outside_of_the_folder(file: Path, tmp_path: Path) -> None:
    """By its whole path, and by a link that lies in the folder."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "here").mkdir()
    outside, source = tmp_path / "elsewhere" / "w.data", tmp_path / "here" / "in.onnx"
    onnx.save(onnx.load(str(file)), str(source), save_as_external_data=True, location="w.data", size_threshold=100)
    (tmp_path / "here" / "w.data").rename(outside)
    (tmp_path / "here" / "w.data").symlink_to(outside)
    assert "outside its folder" in refused("MOEC707", source, tmp_path / "out.onnx").message
    model = onnx.load(str(source), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = str(outside) if entry.key == "location" else entry.value
    source.write_bytes(model.SerializeToString())
    assert "outside its folder" in refused("MOEC707", source, tmp_path / "out.onnx").message


def test_inputs_that_cannot_be_made_up_are_named(tmp_path: Path) -> None:
    """One whose rank nobody knows, and two that do not go together."""
    held = [helper.make_tensor("shape", TensorProto.INT64, [2], [7, 11])]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", "m"]) for name in ("left", "right")]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    nodes = [helper.make_node("Add", ["left", "right"], ["sum"]), helper.make_node("Reshape", ["sum", "shape"], ["y"])]

    def saved(given: Any) -> Path:
        graph = helper.make_graph(nodes, "g", given, [y], held)
        opsets = [helper.make_opsetid("", 18)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "in.onnx")
        return tmp_path / "in.onnx"

    assert "left, right" in refused("MOEC708", saved(inputs), tmp_path / "out.onnx").message
    inputs[1].type.tensor_type.ClearField("shape")
    assert "the input right has no type or no rank" in refused("MOEC708", saved(inputs), tmp_path / "out.onnx").message


def test_int4_on_request(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, path, x = OneLayer(dim=64, hidden=64).eval(), tmp_path / "m.onnx", torch.randn(40, 64)
    report = moec.export(model, path, (x,), target="cpu", quantize="int4")
    assert report.rewritten[0].lowering == "QMoE, int4 in blocks of 32, fp32"
    (node,) = [node for node in onnx.load(str(path)).graph.node if node.op_type == "QMoE"]
    assert {one.name: one.i for one in node.attribute}["expert_weight_bits"] == 4
    with torch.no_grad():
        theirs = model(x).numpy()
    (mine,) = outputs(path, {"x": x.numpy()})
    assert 1e-3 < np.linalg.norm(mine - theirs) / np.linalg.norm(theirs) < 0.3


def test_tune_measures_what_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(choose, "Effort", lambda seconds: Effort(seconds=0.0, min_runs=2, max_runs=2, warmup=0))
    model, x = OneLayer(dim=32, hidden=64).eval(), torch.randn(7, 32)
    options: dict[str, Any] = {"target": "cpu", "quantize": "int8", "tokens": [2], "seconds": 0.0}
    report = moec.export(model, tmp_path / "m.onnx", (x,), tune=True, **options)
    assert report.rewritten[0].choice.startswith("measured here, at 2 tokens: ")
    assert report.rewritten[0].choice.split(": ", 1)[1].startswith(report.rewritten[0].lowering)
    properties = {one.key: one.value for one in onnx.load(str(tmp_path / "m.onnx")).metadata_props}
    assert "measured here" in json.loads(properties["moec.plan"])[0]["because"][0]
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 1


def test_it_says_what_it_is_doing(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from moec import progress

    monkeypatch.setattr(progress, "_rich_status", lambda title: None)
    monkeypatch.setattr(progress.Lines.__init__, "__kwdefaults__", {"every": 0.0})
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("moec.exporter.export.SLOWER", 1e9)
    moec.export(file, tmp_path / "out.onnx", tokens=[4], seconds=0.0)
    said = capsys.readouterr().err
    steps = ("reading", "looking for layers", "checking", "checking the whole file", "timing", "writing")
    assert [said.find(f"export: {step}") >= 0 or f": {step}" in said for step in steps] == [True] * len(steps), said


def test_a_file_of_5000_nodes(file: Path, tmp_path: Path) -> None:
    """One layer, and behind it a long chain of other nodes."""
    model = onnx.load(str(file))
    (last,) = model.graph.output
    name, count = last.name, 5000
    for number in range(count):
        there = last.name if number == count - 1 else f"chain_{number}"
        here = "layer_out" if number == 0 else f"chain_{number - 1}"
        model.graph.node.append(helper.make_node("Neg", [here], [there], name=f"neg_{number}"))
    for node in model.graph.node[:-count]:
        node.output[:] = ["layer_out" if one == name else one for one in node.output]
    onnx.save(model, str(tmp_path / "in.onnx"))
    report = moec.export(tmp_path / "in.onnx", tmp_path / "out.onnx")
    assert [layer.status for layer in report.layers] == ["rewritten"]
    assert len(onnx.load(str(tmp_path / "out.onnx")).graph.node) > count
    x = {"x": np.random.default_rng(1).standard_normal((23, 16)).astype(np.float32)}
    (mine,), (theirs,) = outputs(tmp_path / "out.onnx", x), outputs(tmp_path / "in.onnx", x)
    assert np.linalg.norm(mine - theirs) <= FP32_BAR * np.linalg.norm(theirs)


def large_file(path: Path, layers: int, experts: int, dim: int, hidden: int) -> Path:
    """Layers whose weights are gathered for each slot, x[T, D] -> [T, D], with their weights in a file beside it."""
    random, nodes, held, here, offset = np.random.default_rng(0), [], [], "x", 0
    data = path.with_name(f"{path.name}.data")

    def weight(name: str, *shape: int) -> str:
        nonlocal offset
        array = (random.standard_normal(shape, np.float32) / shape[-1] ** 0.5).astype(np.float32)
        with data.open("ab") as out:
            out.write(array.tobytes())
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", data.name), ("offset", offset), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        held.append(tensor)
        offset += array.nbytes
        return name

    ints = {"two": [2], "last": [-1], "one": [1]}
    held += [helper.make_tensor(name, TensorProto.INT64, [len(one)], one) for name, one in ints.items()]
    for i in range(layers):
        up, down = weight(f"up{i}", experts, hidden, dim), weight(f"down{i}", experts, dim, hidden)
        steps = [
            ("MatMul", [here, weight(f"gate{i}", dim, experts)], ["logits"], {}),
            ("Softmax", ["logits"], ["chances"], {"axis": -1}),
            ("TopK", ["chances", "two"], ["weights", "ids"], {}),
            ("Gather", [up, "ids"], ["ups"], {}),
            ("Unsqueeze", [here, "one"], ["row"], {}),
            ("Unsqueeze", ["row", "last"], ["column"], {}),
            ("MatMul", ["ups", "column"], ["h"], {}),
            ("Relu", ["h"], ["a"], {}),
            ("Gather", [down, "ids"], ["downs"], {}),
            ("MatMul", ["downs", "a"], ["each"], {}),
            ("Squeeze", ["each", "last"], ["rows"], {}),
            ("Unsqueeze", ["weights", "last"], ["factors"], {}),
            ("Mul", ["rows", "factors"], ["weighted"], {}),
            ("ReduceSum", ["weighted", "one"], ["sum"], {"keepdims": 0}),
            ("Add", [here, "sum"], ["out"], {}),
        ]
        given = {here, up, down, f"gate{i}", *ints}
        for kind, inputs, results, attributes in steps:
            names = [one if one in given else f"{one}{i}" for one in inputs]
            nodes.append(
                helper.make_node(kind, names, [f"{one}{i}" for one in results], f"{results[0]}{i}", **attributes)
            )
        here = f"out{i}"
    nodes.append(helper.make_node("Identity", [here], ["y"]))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", dim]) for name in ("x", "y"))
    graph = helper.make_graph(nodes, "g", [x], [y], held)
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()
    )
    return path


REWRITE = """
import json, resource, sys
import moec
report = moec.export(sys.argv[1], sys.argv[2])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps([peak, len(report.rewritten), report.file_bytes, report.load_seconds]))
"""


@pytest.mark.parametrize(
    ("layers", "experts", "dim", "hidden"),
    [(2, 4, 32, 64), pytest.param(5, 16, 1024, 3328, marks=pytest.mark.slow)],
    ids=["small", "over 2 GB"],
)
def test_a_large_file(
    layers: int, experts: int, dim: int, hidden: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The small one checks the test; of the large one the peak of memory is less than its weights and 1.5 GB."""
    source, out = large_file(tmp_path / "in.onnx", layers, experts, dim, hidden), tmp_path / "out.onnx"
    owned = sum(one.stat().st_size for one in tmp_path.iterdir())
    if owned < 2_000_000_000:
        report = moec.export(source, out, external_data=True)
        assert len(report.rewritten) == layers
    else:
        done = subprocess.run(
            [sys.executable, "-c", REWRITE, str(source), str(out)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        peak, rewritten, file_bytes, load_seconds = json.loads(done.stdout)
        assert (rewritten, load_seconds is not None) == (layers, True)
        assert peak < min(owned + 1_500_000_000, 4_000_000_000), peak
        assert file_bytes == out.stat().st_size + Path(f"{out}.data").stat().st_size
    assert sorted(one.name for one in tmp_path.iterdir()) == [
        "in.onnx", "in.onnx.data", "out.onnx", "out.onnx.data",
    ]  # fmt: skip
    x = {"x": np.random.default_rng(1).standard_normal((2, dim)).astype(np.float32)}
    (mine,), (theirs,) = outputs(out, x), outputs(source, x)
    assert np.linalg.norm(mine - theirs) <= FP32_BAR * np.linalg.norm(theirs)
