"""What rewriting an ONNX file costs: the peak of memory for one of 1 GB, and the time for one of 5,000 nodes.

    python examples/benchmarks/onnx_files.py [--folder DIR] [--layers 3] [--blocks 37]

Each file is written by torch's exporter in a process of its own, and rewritten in another one.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def write_large(path: Path, layers: int) -> None:
    """Layers of 8 experts of 1024 to 3584, whose weights are gathered for each slot: 352 MB of weights each."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Layer(nn.Module):
        def __init__(self, experts: int = 8, dim: int = 1024, hidden: int = 3584) -> None:
            super().__init__()
            self.gate = nn.Linear(dim, experts, bias=False)
            self.up = nn.Parameter(torch.randn(experts, 2 * hidden, dim) / 32)
            self.down = nn.Parameter(torch.randn(experts, dim, hidden) / 60)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weights, chosen = self.gate(x).softmax(-1).topk(2, -1)
            a, b = torch.einsum("tkfd,td->tkf", self.up[chosen], x).chunk(2, -1)
            y = torch.einsum("tkdf,tkf->tkd", self.down[chosen], F.silu(a) * b)
            return x + (y * weights.unsqueeze(-1)).sum(1)

    _export(nn.Sequential(*(Layer() for _ in range(layers))), torch.randn(5, 1024), path)


def write_long(path: Path, blocks: int) -> None:
    """Blocks of a MoE layer, all experts for every token, and about 120 other nodes."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.gate = nn.LayerNorm(16), nn.Linear(16, 5, bias=False)
            self.up, self.down = nn.Parameter(torch.randn(5, 16, 48) / 4), nn.Parameter(torch.randn(5, 24, 16) / 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.norm(x)
            weights, chosen = self.gate(h).softmax(-1).topk(2, -1)
            gates = x.new_zeros(x.shape[0], 5).scatter(1, chosen, weights)
            a, b = torch.einsum("td,edf->tef", h, self.up).chunk(2, -1)
            x = x + (torch.einsum("tef,efd->ted", F.silu(a) * b, self.down) * gates.unsqueeze(-1)).sum(1)
            for _ in range(39):
                x = x + torch.tanh(x) * 0.1
            return x

    _export(nn.Sequential(*(Block() for _ in range(blocks))), torch.randn(5, 16), path)


def _export(model: object, example: object, path: Path) -> None:
    import torch

    sizes = ({0: torch.export.Dim.AUTO},)
    with torch.no_grad():
        program = torch.onnx.export(
            model,  # type: ignore[arg-type]
            (example,),
            dynamo=True,
            dynamic_shapes=sizes,
            input_names=["x"],
            verbose=False,
        )
    assert program is not None
    program.save(str(path))


def rewrite(source: Path, out: Path) -> None:
    """In this process, so that its peak is the rewriting's."""
    import onnx

    import moec

    start = time.perf_counter()
    report = moec.export(source, out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {
        "nodes": len(onnx.load(str(source), load_external_data=False).graph.node),
        "bytes": source.stat().st_size,
        "layers": len(report.layers),
        "rewritten": len(report.rewritten),
        "seconds": round(time.perf_counter() - start, 1),
        "peak_gb": round(peak * (1 if sys.platform == "darwin" else 1024) / 1e9, 2),
        "error": report.whole_model_error,
    }
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="for the files; a temporary one by default")
    parser.add_argument("--layers", type=int, default=3, help="of the large file")
    parser.add_argument("--blocks", type=int, default=37, help="of the long file")
    parser.add_argument("--step", nargs=2, metavar=("STEP", "PATH"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        step, path = given.step[0], Path(given.step[1])
        steps = {"large": lambda: write_large(path, given.layers), "long": lambda: write_long(path, given.blocks)}
        steps.get(step, lambda: rewrite(path, path.with_suffix(".out.onnx")))()
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        for kind in ("large", "long"):
            path = Path(folder) / f"{kind}.onnx"
            for step in (kind, "rewrite"):
                sizes = ["--layers", str(given.layers), "--blocks", str(given.blocks)]
                command = [sys.executable, __file__, *sizes, "--step", step, str(path)]
                done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
            print(kind, done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
