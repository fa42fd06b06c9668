"""Experts on this CPU: moec, with and without packed weights, beside transformers' three implementations of one layer.

All contestants run the same transformers MixtralExperts on the same inputs, in turns, in this process. Beside the
medians: each point's floor (what memory or arithmetic allow, measured here), how far the rounds spread, and errors.

    python examples/benchmarks/cpu_experts.py [--layers E8k2D1024F3584 ...] [--dtypes f32 bf16] [--tokens 1 8 64 512]
                                              [--rounds 5] [--json FILE]

T tokens, K experts per token, E experts, D model width, F expert width.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path

import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moec.backendbase import load_backend
from moec.environment import machine, versions
from moec.ir import Builder, ExpertFfn, Region, Tensor, Weight
from moec.progress import progress
from moec.table import milliseconds, table
from moec.weights import View, WeightStore

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
LAYERS = ("E8k2D1024F3584", "E64k8D512F256", "E128k8D256F128")
THEIRS = ("eager", "batched_mm", "grouped_mm")
OURS = ("moec", "moec packed")
# batched_mm copies every token's experts; beyond this it only shows that it should not have been chosen.
MAX_COPIED = 2 * 2**30
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Contestant = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """One layer."""

    experts: int
    k: int
    d: int
    f: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        found = re.fullmatch(r"E(\d+)k(\d+)D(\d+)F(\d+)", text)
        if found is None:
            raise argparse.ArgumentTypeError(f"{text!r} is no layer; write it like {LAYERS[0]}")
        return cls(*map(int, found.groups()))

    def __str__(self) -> str:
        return f"E{self.experts}k{self.k}D{self.d}F{self.f}"


@dataclass
class Point:
    """What was measured for one layer, dtype and number of tokens; times in milliseconds."""

    layer: str
    dtype: str
    tokens: int
    floor: float
    bound_by: str
    median: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def gain(self, name: str) -> float:
        """How many times faster than the best of theirs."""
        return min(self.median[other] for other in THEIRS if other in self.median) / self.median[name]


def make_layer(shape: Shape, dtype: torch.dtype) -> MixtralExperts:
    """Random experts whose outputs have the size of their inputs."""
    config = MixtralConfig(
        hidden_size=shape.d,
        intermediate_size=shape.f,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.k,
    )
    layer = MixtralExperts(config).eval().requires_grad_(False)
    layer.gate_up_proj.copy_(torch.randn_like(layer.gate_up_proj) * shape.d**-0.5)
    layer.down_proj.copy_(torch.randn_like(layer.down_proj) * shape.f**-0.5)
    return layer.to(dtype)


def make_inputs(shape: Shape, dtype: torch.dtype, tokens: int, count: int) -> list[Inputs]:
    """Batches of tokens, each routed by a random softmax top-k, so that calls do not repeat the same experts."""
    batches = []
    for _ in range(count):
        weights, ids = torch.randn(tokens, shape.experts).softmax(1).topk(shape.k, dim=1)
        batches.append((torch.randn(tokens, shape.d).to(dtype), ids, weights / weights.sum(1, keepdim=True)))
    return batches


def region(shape: Shape, dtype: str) -> Region:
    """The layer in moec's IR, as its passes leave it."""
    b = Builder("experts")
    x = b.input("x", Tensor.of(dtype, "T", shape.d))
    ids, weights = (
        b.input("experts", Tensor.of("i64", "T", shape.k)),
        b.input("weights", Tensor.of("f32", "T", shape.k)),
    )
    w_in = b.add(Weight(ref="gate_up", type=Tensor.of(dtype, shape.experts, 2 * shape.f, shape.d)))
    w_out = b.add(Weight(ref="down", type=Tensor.of(dtype, shape.experts, shape.d, shape.f)))
    return b.build(b.add(ExpertFfn(x, ids, weights, w_in, w_out, fn="silu", layout="concat")))


def contestants(shape: Shape, dtype: str, layer: MixtralExperts) -> tuple[dict[str, Contestant], dict[str, str]]:
    """All of them by name, and what moec says it runs."""

    def theirs(name: str) -> Contestant:
        def call(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            layer.config._experts_implementation = name
            return layer(x, ids, weights)  # type: ignore[no-any-return]

        return call

    def views(name: str) -> tuple[View, ...]:
        whole = getattr(layer, name)
        step, *stride = whole.stride()
        return tuple(View(name, e * step, tuple(whole.shape[1:]), tuple(stride)) for e in range(shape.experts))

    found = {name: theirs(name) for name in THEIRS}
    store = WeightStore(layer, {"gate_up": views("gate_up_proj"), "down": views("down_proj")})
    plans = {}
    for name in OURS:
        ours = load_backend("reference").build(region(shape, dtype), store, {}, pack=name != "moec")
        found[name] = lambda *inputs, ours=ours: ours(*inputs)[0]  # type: ignore[misc]
        plans[name] = ours.describe()
    return found, plans


def errors(shape: Shape, calls: dict[str, Contestant], layer: MixtralExperts, inputs: Inputs) -> dict[str, float]:
    """Relative L2 against the original's code in twice the precision, on the first few tokens."""
    x, ids, weights = (t[:16] for t in inputs)
    exact = layer.double() if x.dtype == torch.float32 else layer.float()
    wide = exact.gate_up_proj.dtype
    exact.config._experts_implementation = "eager"
    wanted = exact(x.to(wide), ids, weights.to(wide)).double()
    layer.to(x.dtype)
    found = {}
    for name, call in calls.items():
        found[name] = float((call(x, ids, weights).double() - wanted).norm() / wanted.norm())
    return found


def measure(point: Point, calls: dict[str, Contestant], batches: list[Inputs], rounds: int, seconds: float) -> None:
    """Medians over rounds of each round's median; a round runs every contestant for a while, in turns."""
    medians: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(*batches[0])
    for _ in range(rounds):
        for name, call in calls.items():
            times: list[float] = []
            stop = time.perf_counter() + seconds
            while len(times) < len(batches) or time.perf_counter() < stop:
                x, ids, weights = batches[len(times) % len(batches)]
                start = time.perf_counter()
                call(x, ids, weights)
                times.append(time.perf_counter() - start)
            medians[name].append(1e3 * statistics.median(times))
    for name, found in medians.items():
        point.median[name] = statistics.median(found)
        point.spread[name] = (max(found) - min(found)) / statistics.median(found)


class Floors:
    """What this machine can do at best, measured: reading a working set of some size, and multiplying."""

    def __init__(self) -> None:
        self._bandwidth: dict[int, float] = {}
        self._peak = {name: self._multiply(dtype) for name, dtype in DTYPES.items()}

    def floor(self, shape: Shape, dtype: str, batches: list[Inputs]) -> tuple[float, str]:
        """Milliseconds to read the hit experts, tokens and results, or to multiply, whichever is more; and which."""
        size = DTYPES[dtype].itemsize
        hit = sum(len(ids.unique()) for _, ids, _ in batches) / len(batches)
        tokens = batches[0][0].shape[0]
        nbytes = (hit * 3 * shape.d * shape.f + 2 * tokens * shape.d) * size
        # What is read again and again lies in a cache if it fits, so all the batches' experts count as working set.
        distinct = len(torch.cat([ids.flatten() for _, ids, _ in batches]).unique())
        read = 1e3 * nbytes / self.bandwidth(distinct * 3 * shape.d * shape.f * size)
        multiply = 1e3 * 6 * tokens * shape.k * shape.d * shape.f / self._peak[dtype]
        return max(read, multiply), "memory" if read > multiply else "arithmetic"

    def bandwidth(self, nbytes: float) -> float:
        """Bytes per second when a working set of this size is read again and again."""
        size = 2 ** max(20, min(29, round(nbytes).bit_length() - 1))
        if size not in self._bandwidth:
            w, x = torch.ones(size // 4096, 1024), torch.ones(1, 1024)
            packed = torch.ops.mkldnn._linear_pointwise.default if torch.backends.mkldnn.is_available() else None
            ways: list[Callable[[], object]] = [w.sum, lambda: torch.mv(w, x[0])]
            if packed is not None:
                ways.append(lambda: packed(x, w, None, "none", [], ""))
            self._bandwidth[size] = size / min(map(_best, ways))
        return self._bandwidth[size]

    def _multiply(self, dtype: torch.dtype) -> float:
        """Operations per second of the fastest large product."""
        a, b = torch.ones(1024, 2048, dtype=dtype), torch.ones(2048, 2048, dtype=dtype)
        ways: list[Callable[[], object]] = [lambda: a @ b, lambda: a @ b.T]
        if torch.backends.mkldnn.is_available():
            ways.append(lambda: torch.ops.mkldnn._linear_pointwise.default(a, b, None, "none", [], ""))
        return 2 * 1024 * 2048**2 / min(map(_best, ways))

    def __str__(self) -> str:
        read = ", ".join(f"{size >> 20} MiB {rate / 1e9:.0f} GB/s" for size, rate in sorted(self._bandwidth.items()))
        multiply = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in self._peak.items())
        return f"products: {multiply}; reading again and again: {read}"


def _best(call: Callable[[], object]) -> float:
    call()
    best = float("inf")
    stop = time.perf_counter() + 0.1
    while time.perf_counter() < stop:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def run(arguments: argparse.Namespace, floors: Floors) -> list[Point]:
    """Every point, one after the other."""
    points = []
    total = len(arguments.layers) * len(arguments.dtypes) * len(arguments.tokens)
    with progress("experts", total) as bar:
        for shape in arguments.layers:
            for dtype in arguments.dtypes:
                layer = make_layer(shape, DTYPES[dtype])
                every, _ = contestants(shape, dtype, layer)
                for tokens in arguments.tokens:
                    bar.step(f"{shape} {dtype} T={tokens}")
                    batches = make_inputs(shape, DTYPES[dtype], tokens, arguments.batches)
                    point = Point(str(shape), dtype, tokens, *floors.floor(shape, dtype, batches))
                    copied = tokens * shape.k * 3 * shape.d * shape.f * DTYPES[dtype].itemsize
                    point.skipped = ["batched_mm"] if copied > MAX_COPIED else []
                    calls = {name: call for name, call in every.items() if name not in point.skipped}
                    point.error = errors(shape, calls, layer, batches[0])
                    measure(point, calls, batches, arguments.rounds, arguments.seconds)
                    points.append(point)
    return points


def show(points: Sequence[Point]) -> str:
    """A table of all points and the geometric means."""
    names = (*THEIRS, *OURS)
    headers = ("layer", "dtype", "T", "floor", *names, "gain", "packed", "spread", "error", "packed ", "eager's")
    rows = []
    for p in points:
        times = [milliseconds(p.median.get(name)) for name in names]
        gains = [f"{p.gain(name):.2f}x" for name in OURS]
        wrong = [f"{p.error[name]:.1e}" for name in (*OURS, "eager")]
        spread = f"{max(p.spread[name] for name in p.median):.0%}"
        rows.append((p.layer, p.dtype, str(p.tokens), milliseconds(p.floor), *times, *gains, spread, *wrong))
    lines = [table(headers, rows, right=headers[2:]), ""]
    for name in OURS:
        gains = [p.gain(name) for p in points]
        worst = min(points, key=lambda p: p.gain(name))
        mean = prod(gains) ** (1 / len(gains))
        where = f"{worst.layer} {worst.dtype} T={worst.tokens}"
        lines.append(
            f"{name}: {mean:.2f}x the best of theirs (geometric mean), worst {worst.gain(name):.2f}x at {where}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", type=Shape.parse, default=[Shape.parse(text) for text in LAYERS])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64, 512])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.1, help="for each contestant in each round")
    parser.add_argument("--batches", type=int, default=4, help="inputs that take turns, so that experts do too")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with torch.no_grad():
        floors = Floors()
        points = run(arguments, floors)
    facts = {"machine": machine(), "threads": torch.get_num_threads(), "versions": versions(), "limits": str(floors)}
    print("\n".join(f"{name}: {value}" for name, value in facts.items()))
    print("times in ms, medians; spread: the largest over the contestants, (max - min) / median over rounds\n")
    print(show(points))
    if arguments.json:
        result = {**facts, "points": [{**asdict(p), "gain": {name: p.gain(name) for name in OURS}} for p in points]}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
