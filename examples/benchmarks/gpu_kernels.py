"""Time and check the Triton kernels of experts on one GPU: the plans chosen, or a sweep over paths and tiles.

    PYTHONPATH=. python3 examples/benchmarks/gpu_kernels.py --layers mixtral qwen3 --tokens 1 64 --json out.json

Floor = max(bytes of the hit experts' weights, x and out at 3.0 TB/s, FLOPs at 785 TFLOP/s), as an H100 80GB gives them.
T tokens, K experts per token, E experts, D model width, F expert width.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from moec.backends.triton.choose import GEMV, PERSISTENT, TILES, Plan, Rows, Tile
from moec.backends.triton.grouped_path import GroupedRun
from moec.backends.triton.launch import current_stream
from moec.backends.triton.operands import Operands
from moec.backends.triton.prepare import Prepared, prepare
from moec.ir import Builder, ExpertFfn, Tensor

BYTES_PER_US, FLOPS_PER_US = 3.0e6, 785e6
ACTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


@dataclass(frozen=True)
class Setup:
    """One layer."""

    experts: int
    k: int
    d: int
    f: int
    fn: str = "silu"
    gated: bool = True


LAYERS = {
    "mixtral": Setup(8, 2, 4096, 14336),
    "dbrx": Setup(16, 4, 6144, 10752),
    "grok": Setup(8, 2, 6144, 32768, "gelu"),
    "qwen3": Setup(128, 8, 2048, 768),
    "deepseek": Setup(256, 8, 7168, 2048),
    "switch": Setup(64, 1, 768, 3072, "relu", gated=False),
    "odd": Setup(32, 4, 2880, 2880),
}
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def layer(setup: Setup, dtype: torch.dtype) -> tuple[Prepared, Operands]:
    """A layer with random weights."""
    rows = 2 * setup.f if setup.gated else setup.f
    name = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}[dtype]
    b = Builder("layer")
    e, d, f = setup.experts, setup.d, setup.f
    x, ids = b.input("x", Tensor.of(name, "T", d)), b.input("ids", Tensor.of("i64", "T", "K"))
    weights = b.input("weights", Tensor.of("f32", "T", "K"))
    w_in, w_out = b.input("w_in", Tensor.of(name, e, rows, d)), b.input("w_out", Tensor.of(name, e, d, f))
    op = ExpertFfn(x, ids, weights, w_in, w_out, fn=setup.fn, layout="concat" if setup.gated else "none")
    first = torch.empty(e, rows, d, dtype=dtype, device="cuda")
    second = torch.empty(e, d, f, dtype=dtype, device="cuda")
    for i in range(e):
        first[i].normal_(std=d**-0.5)
        second[i].normal_(std=f**-0.5)
    operands = Operands(first, second)
    return prepare(op, operands, torch.device("cuda", torch.cuda.current_device())), operands


def inputs(setup: Setup, tokens: int, count: int, dtype: torch.dtype) -> list[Inputs]:
    """Several inputs with slightly uneven routing."""
    found = []
    for i in range(count):
        generator = torch.Generator("cuda").manual_seed(i)
        logits = torch.randn(tokens, setup.experts, device="cuda", generator=generator)
        logits += 0.3 * torch.randn(setup.experts, device="cuda", generator=generator)
        top = logits.topk(setup.k, dim=1)
        x = torch.randn(tokens, setup.d, device="cuda", generator=generator).to(dtype)
        found.append((x, top.indices.int(), top.values.softmax(1)))
    return found


def floor(setup: Setup, batches: list[Inputs], size: int) -> float:
    """Microseconds."""
    tokens = batches[0][0].shape[0]
    hit = sum(len(ids.unique()) for _, ids, _ in batches) / len(batches)
    matrices = 3 if setup.gated else 2
    moved = hit * matrices * setup.d * setup.f * size + 2 * tokens * setup.d * size
    flops = 2 * tokens * setup.k * matrices * setup.d * setup.f
    return max(moved / BYTES_PER_US, flops / FLOPS_PER_US)


def error(setup: Setup, operands: Operands, batch: Inputs, out: torch.Tensor, count: int = 4) -> float:
    """Relative L2 over a few tokens, against fp32."""
    x, ids, weights = batch
    gap = total = 0.0
    assert isinstance(operands.w_in, torch.Tensor)
    assert isinstance(operands.w_out, torch.Tensor)
    picked = torch.linspace(0, len(x) - 1, min(count, len(x))).long().tolist()
    for t in picked:
        wanted = torch.zeros(setup.d, device="cuda")
        for e, weight in zip(ids[t].tolist(), weights[t].tolist(), strict=True):
            h = operands.w_in[e].float() @ x[t].float()
            if setup.gated:
                gate, up = h.chunk(2)
                h = ACTS[setup.fn](gate) * up
            else:
                h = ACTS[setup.fn](h)
            wanted += weight * (operands.w_out[e].float() @ h)
        gap += float((out[t].float() - wanted).square().sum())
        total += float(wanted.square().sum())
    return float((gap / total) ** 0.5) if bool(out.isfinite().all()) else float("inf")


def graph_time(steps: list[Callable[[], object]], least_us: float = 20000.0) -> float:
    """Microseconds a step, replayed from one CUDA graph that holds all of them."""
    for step in steps:
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    return repeat(graph.replay, len(steps), least_us)


def loop_time(steps: list[Callable[[], object]], least_us: float = 20000.0) -> float:
    """Microseconds a step, launched one after the other."""

    def go() -> None:
        for step in steps:
            step()

    return repeat(go, len(steps), least_us)


def repeat(go: Callable[[], object], count: int, least_us: float) -> float:
    """The best of three means over at least `least_us` each."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def once(times: int) -> float:
        start.record()
        for _ in range(times):
            go()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1000 / times

    once(1)
    times = max(1, int(least_us / max(once(1), 1.0)))
    return min(once(times) for _ in range(3)) / count


def host_time(step: Callable[[], object], times: int = 200) -> float:
    """Microseconds until a call returns, with an idle device."""
    found = []
    for _ in range(times):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        found.append(time.perf_counter() - begin)
    return sorted(found)[times // 2] * 1e6


def whole(prepared: Prepared, batches: list[Inputs], plan: Plan | None) -> list[Callable[[], object]]:
    """One call for each input."""
    return [lambda b=b: prepared(*b, plan=plan) for b in batches]  # type: ignore[misc]


def tiles_to_try(setup: Setup, tokens: int) -> Iterable[tuple[str, list[Tile], list[Tile]]]:
    """path, tiles of the first product, tiles of the second; all with the same rows."""
    rows = tokens * setup.k / setup.experts
    narrow = 1 if setup.gated else 2
    if rows < 24:
        for bm in (16, 32, 64):
            if bm > 16 and rows * 4 < bm:
                continue
            one = [
                Tile(bm, bn * narrow, bk, 4, stages)
                for bn, bk, stages in ((32, 128, 4), (32, 256, 3), (64, 128, 3), (64, 64, 4), (32, 64, 5), (16, 256, 4))
            ]
            two = [
                Tile(bm, bn, bk, 4, stages)
                for bn, bk, stages in (
                    (64, 128, 4),
                    (32, 256, 4),
                    (32, 128, 5),
                    (64, 256, 3),
                    (128, 64, 4),
                    (128, 128, 3),
                )
            ]
            yield TILES, one, two
    if rows >= 2:
        one = [
            Tile(64, 64 * narrow, 64, 4, 4, 8, per_processor=2),
            Tile(64, 64 * narrow, 64, 4, 3, 8, per_processor=3),
            Tile(64, 64 * narrow, 128, 4, 2, 8, per_processor=2),
            Tile(64, 128 * narrow, 64, 4, 2, 8, per_processor=2),
            Tile(64, 64 * narrow, 64, 4, 4, 8, flatten=True, per_processor=2),
            Tile(64, 64 * narrow, 128, 4, 4, 8, flatten=True),
        ]
        two = [
            Tile(64, 128, 64, 4, 4, 8, per_processor=2),
            Tile(64, 128, 64, 4, 3, 8, per_processor=3),
            Tile(64, 128, 128, 4, 2, 8, per_processor=2),
            Tile(64, 256, 64, 4, 2, 8, per_processor=2),
            Tile(64, 128, 64, 4, 4, 8, flatten=True, per_processor=2),
            Tile(64, 128, 128, 4, 4, 8),
        ]
        yield PERSISTENT, one, two
    if rows >= 24:
        one = [
            Tile(128, 128 * narrow, 64, 8, 4, 16),
            Tile(128, 128 * narrow, 64, 8, 4, 16, flatten=True),
            Tile(128, 128 * narrow, 64, 8, 4, 16),
            Tile(128, 128 * narrow, 64, 8, 4, 16, flatten=True),
            Tile(128, 64 * narrow, 64, 4, 3, 8, per_processor=2),
            Tile(128, 64 * narrow, 64, 8, 3, 8, per_processor=2),
            Tile(128, 64 * narrow, 64, 4, 3, 16, per_processor=2),
            Tile(128, 64 * narrow, 64, 4, 3, 8, flatten=True, per_processor=2),
        ]
        two = [
            Tile(128, 256, 64, 8, 4, 16),
            Tile(128, 256, 64, 8, 4, 16, flatten=True),
            Tile(128, 256, 64, 8, 3, 16),
            Tile(128, 256, 64, 8, 4, 8),
            Tile(128, 128, 64, 4, 3, 8, per_processor=2),
            Tile(128, 128, 64, 8, 3, 8, per_processor=2),
            Tile(128, 128, 64, 4, 3, 16, per_processor=2),
            Tile(128, 128, 64, 4, 3, 8, flatten=True, per_processor=2),
        ]
        yield PERSISTENT, one, two


def gemv_to_try(tokens: int) -> Iterable[Plan]:
    """Plans of the path of single rows."""
    shapes = [
        Rows(2, 1024),
        Rows(4, 1024),
        Rows(8, 512),
        Rows(4, 512),
        Rows(2, 2048, 8),
        Rows(4, 2048, 8),
        Rows(8, 1024, 8),
    ]
    del tokens
    for shape in shapes:
        yield Plan(GEMV, shape, shape, "sweep")


class Sweep:
    """All candidates of one layer and number of tokens."""

    def __init__(self, prepared: Prepared, setup: Setup, batches: list[Inputs], deadline: float) -> None:
        self.prepared, self.setup, self.batches, self.deadline = prepared, setup, batches, deadline
        self.rows: list[dict[str, Any]] = []

    def run(self) -> list[dict[str, Any]]:
        """Every candidate with its time, or why it failed."""
        tokens, setup = self.batches[0][0].shape[0], self.setup
        if tokens * setup.k / setup.experts <= 1:
            for plan in gemv_to_try(tokens):
                self.note(str(plan), "all", lambda plan=plan: graph_time(whole(self.prepared, self.batches, plan)))  # type: ignore[misc]
        if tokens > 1:
            for path, one, two in tiles_to_try(setup, tokens):
                self.products(path, one, two)
        return self.rows

    def note(self, name: str, part: str, measure: Callable[[], float]) -> None:
        if time.time() > self.deadline:
            return
        try:
            row: dict[str, Any] = {"plan": name, "part": part, "us": round(measure(), 2)}
        except Exception as problem:  # a candidate may not fit the GPU
            row = {"plan": name, "part": part, "failed": f"{type(problem).__name__}: {problem}"[:200]}
        self.rows.append(row)

    def products(self, path: str, one: list[Tile], two: list[Tile]) -> None:
        """Each product's tiles timed on their own, the other steps once."""
        done = False
        for first, second in itertools.zip_longest(one, two):
            plan = Plan(path, first or one[0], second or two[0])
            try:
                states = [self.state(plan, batch) for batch in self.batches]
            except Exception as problem:
                self.rows.append({"plan": str(plan), "part": "state", "failed": str(problem)[:200]})
                continue
            if first:
                self.note(f"{path} {_name(first)}", "first", lambda s=states: graph_time([x["first"] for x in s]))  # type: ignore[misc]
            if second:
                self.note(f"{path} {_name(second)}", "second", lambda s=states: graph_time([x["second"] for x in s]))  # type: ignore[misc]
            if not done:
                done = True
                name = f"{path} bm{one[0].bm}"
                self.note(name, "arrange", lambda s=states: graph_time([x["arrange"] for x in s]))  # type: ignore[misc]
                self.note(name, "last", lambda s=states: graph_time([x["last"] for x in s]))  # type: ignore[misc]
                self.note(str(plan), "all", lambda plan=plan: graph_time(whole(self.prepared, self.batches, plan)))  # type: ignore[misc]

    def state(self, plan: Plan, batch: Inputs) -> dict[str, Callable[[], object]]:
        """The steps of a call, each ready to run on its own."""
        x, ids, weights = batch
        run = self.prepared.run_for(*batch, plan=plan)
        assert isinstance(run, GroupedRun)
        meta = torch.empty(run.meta_size, dtype=torch.int32, device="cuda")
        h, out = x.new_empty(run.h_size), torch.empty_like(x)
        y = out if run.y_size is None else x.new_empty(run.y_size)
        stream = current_stream(x.device)
        run.arrange(stream, ids, None, meta)
        return {
            "arrange": lambda: run.arrange(current_stream(x.device), ids, None, meta),
            "first": lambda: run.first(current_stream(x.device), x, meta, h),
            "second": lambda: run.second(current_stream(x.device), h, meta, weights, y),
            "last": lambda: run.last(current_stream(x.device), y, ids, None, out),
        }


def _name(tile: Tile) -> str:
    return "x".join(str(int(part)) for part in tile)


def measure(name: str, tokens: list[int], args: argparse.Namespace, deadline: float) -> list[dict[str, Any]]:
    """All rows of one layer."""
    setup = LAYERS[name]
    dtype = getattr(torch, args.dtype)
    prepared, operands = layer(setup, dtype)
    rows = []
    for t in tokens:
        if time.time() > deadline:
            break
        batches = inputs(setup, t, 8 if t <= 64 else args.inputs, dtype)
        least = floor(setup, batches, dtype.itemsize)
        begin = time.time()
        out = torch.full_like(batches[0][0], float("nan"))
        prepared(*batches[0], out=out)
        gap = error(setup, operands, batches[0], out)
        again = prepared(*batches[0])
        steps = whole(prepared, batches, None)
        graph = graph_time(steps)
        loop = loop_time(steps)
        row = {
            "layer": name,
            "tokens": t,
            "plan": str(prepared.plan(t, setup.k)),
            "graph_us": round(graph, 2),
            "loop_us": round(loop, 2),
            "host_us": round(host_time(steps[0]), 1) if t <= 64 else None,
            "floor_us": round(least, 2),
            "fraction": round(least / min(graph, loop), 3),
            "error": gap,
            "same_bits": bool(torch.equal(out, again)),
        }
        if args.sweep:
            row["sweep"] = Sweep(prepared, setup, batches, deadline).run()
        row["seconds"] = round(time.time() - begin, 1)
        rows.append(row)
        show = {key: value for key, value in row.items() if key != "sweep"}
        print(" ".join(str(value) for value in show.values()), flush=True)
        for part in ("all", "arrange", "first", "second", "last"):
            found = [s for s in row.get("sweep", []) if s["part"] == part and "us" in s]  # type: ignore[attr-defined]
            best = sorted(found, key=lambda s: s["us"])[:3]
            if best:
                print("   ", part, "; ".join(f"{s['us']} {s['plan']}" for s in best), flush=True)
        Path(args.json).write_text(json.dumps(rows))
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64, 512, 4096, 16384])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--sweep", action="store_true", help="time every candidate, each product on its own")
    parser.add_argument("--inputs", type=int, default=3, help="inputs to rotate over from 65 tokens on")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so many")
    parser.add_argument("--json", default="gpu_kernels.json")
    args = parser.parse_args()
    deadline = time.time() + args.seconds
    rows = []
    target = args.json
    for name in args.layers:
        args.json = f"{target}.{name}"
        rows += measure(name, args.tokens, args, deadline)
        torch.cuda.empty_cache()
        Path(target).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
