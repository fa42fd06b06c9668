"""A training step of experts on a GPU: forward and backward by moec's kernels beside transformers' and torch's ways.

All contestants run the same layer on the same inputs in this process and give gradients of the input, the routing
weights and all experts' weights. Beside times: memory kept between forward and backward, the peak of a step, errors of
results and gradients against fp32, and whether two steps give the same bits. It fails where an error is more than 1.5
times that of torch's own 16-bit steps.

    python examples/benchmarks/gpu_training.py [--layers E8k2D4096F14336 ...] [--tokens 512 4096] [--kernels]

T tokens, K experts per token, E experts, D model width, F expert width.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from gpu_contestants import REGISTRY, Call, Inputs, Layer, Shape, Unfit, make_inputs, region, store
from gpu_experts import DTYPES, repeated

from moec.backendbase import load_backend
from moec.environment import machine, versions
from moec.progress import progress
from moec.table import table

LAYERS = ("E8k2D4096F14336", "E128k8D2048F768", "E64k1D768F3072-relu-plain")
THEIRS = ("eager", "grouped_mm", "grouped by hand")
FACTOR = 1.5
MIB = 2**20
Gradients = tuple[torch.Tensor, ...]


@dataclass
class Point:
    """What was measured for one layer and number of tokens: microseconds, MiB, relative L2 by name of the tensor."""

    layer: str
    dtype: str
    tokens: int
    forward: dict[str, float] = field(default_factory=dict)
    step: dict[str, float] = field(default_factory=dict)
    kept: dict[str, float] = field(default_factory=dict)
    peak: dict[str, float] = field(default_factory=dict)
    error: dict[str, dict[str, float]] = field(default_factory=dict)
    same_bits: dict[str, bool] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def failures(self) -> list[str]:
        """Errors of moec's that are more than 1.5 times the least of torch's own."""
        found = []
        for name, mine in self.error.get("moec", {}).items():
            own = [errors[name] for other, errors in self.error.items() if other != "moec"]
            if own and mine > FACTOR * min(own):
                found.append(
                    f"{self.layer} T={self.tokens}: {name} is {mine:.1e} from fp32, torch's own {min(own):.1e}"
                )
        return found


def moec_call(layer: Layer) -> Call:
    """The layer with gradients by moec's kernels."""
    dtype = {kind: name for name, kind in DTYPES.items()}[layer.get_parameter("first").dtype]
    recording = load_backend("triton").recording(region(layer.shape, dtype), store(layer))  # type: ignore[attr-defined]
    if isinstance(recording, str):
        raise Unfit(recording)
    return lambda *given: recording(*given)[0]  # type: ignore[no-any-return]


def plain(layer: Layer, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Expert by expert, in x's dtype: the judge in fp32."""
    y = torch.zeros_like(x)
    for e in range(layer.shape.experts):
        tokens, choices = (ids == e).nonzero(as_tuple=True)
        if tokens.numel():
            y = y.index_add(0, tokens, layer.expert(e, x[tokens]) * weights[tokens, choices, None].to(x.dtype))
    return y


def gradients(call: Call, layer: Layer, batch: Inputs, dy: torch.Tensor) -> Gradients:
    """The result, and gradients of x, routing weights, first and second."""
    x, ids, weights = batch
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    y = call(x, ids, weights)
    wanted = [x, weights, *(layer.get_parameter(name) for name in ("first", "second"))]
    return y.detach(), *torch.autograd.grad(y, wanted, dy.to(y.dtype))


NAMES = ("y", "x", "weights", "first", "second")


def exact(layer: Layer, batch: Inputs, dy: torch.Tensor) -> Gradients:
    """The same in fp32, of the same rounded weights and inputs."""
    wide = Layer.__new__(Layer)
    torch.nn.Module.__init__(wide)
    wide.shape = layer.shape
    for name in ("first", "second"):
        wide.register_parameter(name, torch.nn.Parameter(layer.get_parameter(name).detach().float()))
    x, ids, weights = batch
    return gradients(lambda *given: plain(wide, *given), wide, (x.float(), ids, weights), dy)


def errors(found: Gradients, wanted: Gradients) -> dict[str, float]:
    """Relative L2 by name."""
    pairs = zip(NAMES, found, wanted, strict=True)
    return {name: float((a.float() - b.float()).norm() / b.float().norm()) for name, a, b in pairs}


def memory(call: Call, layer: Layer, batch: Inputs, dy: torch.Tensor) -> tuple[float, float]:
    """MiB kept between forward and backward beside the result, and the peak of a step above what was there before."""
    x, ids, weights = batch
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = call(x, ids, weights)
    kept = torch.cuda.memory_allocated() - before - y.nbytes
    wanted = [x, weights, *(layer.get_parameter(name) for name in ("first", "second"))]
    found = torch.autograd.grad(y, wanted, dy.to(y.dtype))
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del found
    return kept / MIB, peak / MIB


def measure(point: Point, name: str, call: Call, layer: Layer, batch: Inputs, wanted: Gradients) -> None:
    """Fill in one contestant's figures."""
    dy = seed_for(batch[0])
    found = gradients(call, layer, batch, dy)
    point.error[name] = errors(found, wanted)
    again = gradients(call, layer, batch, dy)
    point.same_bits[name] = all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    del found, again
    point.kept[name], point.peak[name] = memory(call, layer, batch, dy)
    x, ids, weights = batch
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    point.forward[name] = repeated(lambda: call(x, ids, weights))
    point.step[name] = repeated(lambda: gradients(call, layer, batch, dy))


def seed_for(x: torch.Tensor) -> torch.Tensor:
    """A gradient of the result, [T, D]."""
    generator = torch.Generator(x.device).manual_seed(99)
    return torch.randn(x.shape, device=x.device, generator=generator).to(x.dtype)


def kernels(call: Call, layer: Layer, batch: Inputs) -> str:
    """Which kernels a step's time goes to."""
    dy = seed_for(batch[0])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        gradients(call, layer, batch, dy)
        torch.cuda.synchronize()
    rows = sorted(found.key_averages(), key=lambda e: -e.device_time_total)[:12]
    return table(("kernel", "us", "calls"), [(e.key[:60], f"{e.device_time_total:.0f}", str(e.count)) for e in rows])


def run_layer(shape: Shape, arguments: argparse.Namespace, step: Callable[[str], None]) -> list[Point]:
    """Every number of tokens of one layer."""
    dtype = DTYPES[arguments.dtype]
    layer = Layer(shape, dtype)
    layer.requires_grad_()
    calls: dict[str, Call] = {}
    refused: dict[str, str] = {}
    for name in ("moec", *THEIRS):
        try:
            calls[name] = moec_call(layer) if name == "moec" else REGISTRY[name](layer)
        except Unfit as unfit:
            refused[name] = str(unfit)
    points = []
    for tokens in arguments.tokens:
        step(f"{shape} T={tokens}")
        (batch,) = make_inputs(shape, dtype, tokens, 1)
        point = Point(str(shape), arguments.dtype, tokens, left_out=dict(refused))
        wanted = exact(layer, batch, seed_for(batch[0]))
        for name, call in calls.items():
            try:
                measure(point, name, call, layer, batch, wanted)
            except (Unfit, torch.OutOfMemoryError) as problem:
                point.left_out[name] = str(problem).splitlines()[0]
        del wanted
        if arguments.kernels and "moec" in calls:
            print(f"{shape} T={tokens}\n{kernels(calls['moec'], layer, batch)}\n")
        points.append(point)
    return points


def show(points: Sequence[Point]) -> str:
    """A table with a row for each point and contestant."""
    headers = ("layer", "T", "who", "forward us", "step us", "kept MiB", "peak MiB", *NAMES, "same bits")
    rows = []
    for p in points:
        for name in p.step:
            times = (f"{p.forward[name]:.0f}", f"{p.step[name]:.0f}", f"{p.kept[name]:.0f}", f"{p.peak[name]:.0f}")
            gaps = [f"{p.error[name][part]:.1e}" for part in NAMES]
            rows.append((p.layer, str(p.tokens), name, *times, *gaps, "yes" if p.same_bits[name] else "no"))
    return table(headers, rows, right=headers[3:12])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", type=Shape.parse, default=[Shape.parse(text) for text in LAYERS])
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 4096])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--kernels", action="store_true", help="print which kernels moec's time goes to")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "gpu_training.py: there is no CUDA device\n")
    torch.manual_seed(0)
    points: list[Point] = []
    facts = {"gpu": torch.cuda.get_device_name(), "machine": machine(), "versions": versions()}
    with progress("training", len(arguments.layers) * len(arguments.tokens)) as bar:
        for shape in arguments.layers:
            points += run_layer(shape, arguments, bar.step)
            torch.cuda.empty_cache()
    if arguments.json:
        arguments.json.write_text(json.dumps({**facts, "points": [asdict(p) for p in points]}, indent=1) + "\n")
    print("\n".join(f"{name}: {value}" for name, value in facts.items()), "\n")
    print(show(points))
    for p in points:
        for name, why in p.left_out.items():
            print(f"{p.layer} T={p.tokens}: {name} left out: {why}")
    failures = [failure for p in points for failure in p.failures()]
    if failures:
        parser.exit(1, "\n".join(failures) + "\n")


if __name__ == "__main__":
    main()
