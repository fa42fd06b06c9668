"""torch.compile(model, backend="moec").

B sequences, S tokens a sequence, D width, E experts, K experts a token.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

from moec.dynamo import reports
from tests.frontend.graph_inputs import KINDS, SIZES, D, net, run_traced, words
from tests.frontend.test_callers import agrees

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_of_torch_compile(kind: type[nn.Module]) -> None:
    model = net(kind, 1)
    graph = run_traced(model)
    with torch.no_grad():
        for size in SIZES:
            agrees(graph(words(*size)), model(words(*size)))
        assert [layer.compiled for layer in reports[-1].layers] == [True] * 2, reports[-1]
        assert reports[-1].layers[0].name == "blocks.0.mixture"
        for p in model.parameters():
            p.mul_(1.1)
        agrees(graph(words(3, 9)), model(words(3, 9)))


def test_graphs_without_layers_are_passed_on() -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh()).eval()
    graph = run_traced(model)
    with torch.no_grad():
        agrees(graph(torch.ones(3, D)), model(torch.ones(3, D)))
    assert not any(report.compiled for report in reports)


def test_options_of_the_back_end() -> None:
    graph = run_traced(net(blocks=1), quantize="int8")
    with torch.no_grad():
        graph(words(2, 5))
    assert all("quantize-experts" in layer.passes for layer in reports[-1].compiled)
    wrong = run_traced(net(blocks=1), quantise="int8")
    with torch.no_grad(), pytest.raises(Exception, match="quantise"):
        wrong(words(2, 5))


def test_the_back_end_by_its_name(tmp_path: Path) -> None:
    """Through the entry point that pyproject.toml declares."""
    root = Path(__file__).parents[2]
    declared = tomllib.loads((root / "pyproject.toml").read_text())["project"]["entry-points"]
    lines = [f"{name} = {value}" for name, value in declared["torch_dynamo_backends"].items()]
    info = tmp_path / "moec_entry_points-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: moec-entry-points\nVersion: 0\n")
    (info / "entry_points.txt").write_text("\n".join(["[torch_dynamo_backends]", *lines, ""]))
    code = """
import torch
from torch import nn
model = nn.Sequential(nn.Linear(8, 40), nn.GELU(), nn.Linear(40, 8)).eval()
with torch.no_grad():
    graph = torch.compile(model, backend="moec", dynamic=True, options={"inner": "eager"})
    torch.testing.assert_close(graph(torch.ones(3, 8)), model(torch.ones(3, 8)))
from moec.dynamo import reports
assert [layer.compiled for layer in reports[-1].layers] == [True], reports[-1]
"""
    path = f"{tmp_path}:{root}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={"PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
