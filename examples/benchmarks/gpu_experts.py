"""Experts on a GPU: moec beside transformers' implementations, torch's grouped product by hand, and vLLM's if there.

All contestants run the same layer on the same inputs in this process. Time is the lesser of a back-to-back loop and the
replay of a CUDA graph, over several inputs in turn. Beside it: the floor (what this GPU's memory or arithmetic allow,
both measured here), host time of one call, errors against fp32, and whether two calls give the same bits.

    python examples/benchmarks/gpu_experts.py [--layers E8k2D4096F14336 ...] [--tokens 1 8 64 512 4096 16384]
                                              [--only moec "grouped by hand"] [--json FILE] [--plot FILE.svg]

T tokens, K experts per token, E experts, D model width, F expert width.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path

import torch
from gpu_contestants import REGISTRY, Call, Inputs, Layer, Shape, Unfit, make_inputs
from gpu_plot import plot

from moec.environment import machine, versions
from moec.progress import progress
from moec.table import table

LAYERS = (
    "E8k2D4096F14336",
    "E16k4D6144F10752",
    "E8k2D6144F32768-gelu",
    "E128k8D2048F768",
    "E256k8D7168F2048",
    "E64k1D768F3072-relu-plain",
)
REST = 0.3
"""Seconds without work before each measurement."""
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


@dataclass
class Point:
    """What was measured for one layer and number of tokens; microseconds."""

    layer: str
    dtype: str
    tokens: int
    floor: float
    loop: dict[str, float] = field(default_factory=dict)
    graph: dict[str, float] = field(default_factory=dict)
    host: dict[str, float] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    same_bits: dict[str, bool] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def time(self, name: str) -> float | None:
        """The lesser of both ways to call it."""
        return min((t[name] for t in (self.loop, self.graph) if name in t), default=None)

    def best(self, *, ours: bool) -> tuple[float, str] | None:
        """The best time of moec's contestants or of all others, and whose it is."""
        names = {*self.loop, *self.graph}
        found = [(t, n) for n in names if n.startswith("moec") == ours and (t := self.time(n)) is not None]
        return min(found, default=None)


class Limits:
    """What this GPU can do, measured: bytes of a copy, read and written, and operations of a product, per second."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.bandwidth = self._copy()
        b = torch.randn(8192, 8192, device="cuda").to(dtype)
        self.peak = 2 * 8192**3 / (1e-6 * repeated(lambda: b @ b))

    @staticmethod
    def _copy() -> float:
        a, b = (torch.empty(2**30, dtype=torch.uint8, device="cuda") for _ in range(2))
        return 2 * a.numel() / (1e-6 * repeated(lambda: b.copy_(a)))

    def floor(self, shape: Shape, batches: Sequence[Inputs], itemsize: int) -> float:
        """Microseconds to move the hit experts' weights, x and out, or to multiply, whichever is more."""
        tokens = batches[0][0].shape[0]
        hit = sum(len(ids.unique()) for _, ids, _ in batches) / len(batches)
        moved = (hit * shape.matrices * shape.d * shape.f + 2 * tokens * shape.d) * itemsize
        flops = 2 * tokens * shape.k * shape.matrices * shape.d * shape.f
        return 1e6 * max(moved / self.bandwidth, flops / self.peak)

    def __str__(self) -> str:
        return f"copy {self.bandwidth / 1e12:.2f} TB/s, products {self.peak / 1e12:.0f} TFLOP/s"


def repeated(go: Callable[[], object], least: float = 2e4, rounds: int = 5) -> float:
    """Microseconds a call: the median of rounds of at least `least` microseconds each, from a rested GPU on.

    A GPU that has worked at its power limit for a while slows down by a quarter; whoever comes next must not pay.
    """
    torch.cuda.synchronize()
    time.sleep(REST)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def once(times: int) -> float:
        start.record()
        for _ in range(times):
            go()
        end.record()
        end.synchronize()
        return 1e3 * float(start.elapsed_time(end)) / times

    once(2)
    times = max(1, int(least / max(once(2), 1.0)))
    return statistics.median(once(times) for _ in range(rounds))


def loop_time(call: Call, batches: Sequence[Inputs]) -> float:
    """Microseconds a call, launched one after the other."""

    def go() -> None:
        for batch in batches:
            call(*batch)

    return repeated(go) / len(batches)


def graph_time(call: Call, batches: Sequence[Inputs]) -> float | None:
    """Microseconds a call, replayed from one CUDA graph of all batches; None where it cannot be captured."""
    try:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for batch in batches:
                call(*batch)
    except RuntimeError:  # it waits for the device somewhere
        torch.cuda.synchronize()
        return None
    return repeated(graph.replay) / len(batches)


def host_time(call: Call, batch: Inputs, times: int = 50) -> float:
    """Microseconds until a call returns while the device is idle; the median."""
    found = []
    for _ in range(times):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call(*batch)
        found.append(1e6 * (time.perf_counter() - begin))
    torch.cuda.synchronize()
    return statistics.median(found)


def error_of(layer: Layer, batch: Inputs, y: torch.Tensor, count: int = 8) -> float:
    """Relative L2 against fp32, on tokens from all over the batch."""
    x, ids, weights = batch
    picked = torch.linspace(0, x.shape[0] - 1, min(count, x.shape[0])).long().tolist()
    gap = total = 0.0
    for t in picked:
        rows = [w * layer.expert(e, x[t : t + 1].float())[0] for e, w in zip(ids[t].tolist(), weights[t], strict=True)]
        wanted = torch.stack(rows).sum(0)
        gap += float((y[t].float() - wanted).square().sum())
        total += float(wanted.square().sum())
    return (gap / total) ** 0.5 if bool(y.isfinite().all()) else float("inf")


def measure(point: Point, name: str, call: Call, layer: Layer, batches: Sequence[Inputs]) -> None:
    """Fill in one contestant's figures."""
    y = call(*batches[0])
    point.error[name] = error_of(layer, batches[0], y)
    point.same_bits[name] = torch.equal(y, call(*batches[0]))
    for batch in batches:
        call(*batch)
    point.loop[name] = loop_time(call, batches)
    graph = graph_time(call, batches)
    if graph is not None:
        point.graph[name] = graph
    point.host[name] = host_time(call, batches[0])


def run_layer(shape: Shape, arguments: argparse.Namespace, limits: Limits, step: Callable[[str], None]) -> list[Point]:
    """Every number of tokens of one layer."""
    dtype = DTYPES[arguments.dtype]
    layer = Layer(shape, dtype).eval()
    calls: dict[str, Call] = {}
    refused: dict[str, str] = {}
    for name in arguments.only:
        try:
            calls[name] = REGISTRY[name](layer)
        except Unfit as unfit:
            refused[name] = str(unfit)
    points = []
    for tokens in arguments.tokens:
        step(f"{shape} T={tokens}")
        # In turn, so that what one call read is not in the cache for the next; large ones need no turns for that.
        batches = make_inputs(shape, dtype, tokens, 8 if tokens <= 64 else 3 if tokens <= 1024 else 1)
        point = Point(str(shape), arguments.dtype, tokens, limits.floor(shape, batches, dtype.itemsize))
        point.left_out = dict(refused)
        for name, call in calls.items():
            try:
                measure(point, name, call, layer, batches)
            except (Unfit, torch.OutOfMemoryError) as problem:
                point.left_out[name] = str(problem).splitlines()[0]
        points.append(point)
    return points


def show(points: Sequence[Point], names: Sequence[str]) -> str:
    """A table of all points and the geometric mean over the best of the others."""
    headers = ("layer", "T", "floor", *names, "of floor", "gain", "host", "error")
    rows = []
    gains = []
    for p in points:
        times = ["-" if (t := p.time(name)) is None else f"{t:.1f}" for name in names]
        mine, theirs = p.best(ours=True), p.best(ours=False)
        fraction = f"{p.floor / mine[0]:.2f}" if mine else "-"
        gain = theirs[0] / mine[0] if mine and theirs else None
        gains += [gain] if gain else []
        last = (f"{p.host[mine[1]]:.0f}", f"{p.error[mine[1]]:.1e}") if mine else ("-", "-")
        rows.append(
            (p.layer, str(p.tokens), f"{p.floor:.1f}", *times, fraction, f"{gain:.2f}x" if gain else "-", *last)
        )
    lines = [table(headers, rows, right=headers[1:])]
    if gains:
        mean = prod(gains) ** (1 / len(gains))
        lines.append(f"\nmoec: {mean:.2f}x the best of the others (geometric mean), worst {min(gains):.2f}x")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", type=Shape.parse, default=[Shape.parse(text) for text in LAYERS])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64, 512, 4096, 16384])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--only", nargs="+", choices=REGISTRY, default=list(REGISTRY), help="contestants")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--plot", type=Path, help="draw times over the floor, one panel a layer, to this SVG file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "gpu_experts.py: there is no CUDA device\n")
    torch.manual_seed(0)
    points: list[Point] = []
    with torch.no_grad(), progress("experts", len(arguments.layers) * len(arguments.tokens)) as bar:
        limits = Limits(DTYPES[arguments.dtype])
        device = torch.cuda.get_device_name()
        facts = {"gpu": device, "limits": str(limits), "machine": machine(), "versions": versions()}
        for shape in arguments.layers:
            points += run_layer(shape, arguments, limits, bar.step)
            torch.cuda.empty_cache()
            write(points, facts, arguments)  # after each layer: who loses patience keeps what was measured
    print("\n".join(f"{name}: {value}" for name, value in facts.items()), "\n\ntimes in microseconds\n")
    print(show(points, arguments.only))


def write(points: Sequence[Point], facts: dict[str, object], arguments: argparse.Namespace) -> None:
    """The files asked for, with the points so far."""
    if arguments.json:
        arguments.json.write_text(json.dumps({**facts, "points": [asdict(p) for p in points]}, indent=1) + "\n")
    if arguments.plot:
        arguments.plot.write_text(plot([(p.layer, p.tokens, p.floor, {n: p.time(n) for n in p.loop}) for p in points]))


if __name__ == "__main__":
    main()
