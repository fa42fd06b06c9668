"""Finding the fastest plan by measuring: from the cost model's, one product at a time, keeping what is faster.

T tokens, K experts per token, E experts, D model width.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from moec.backends.triton.candidates import paths, row_counts, rows_near, tiles_near
from moec.backends.triton.choose import Plan, Rows, Tile
from moec.backends.triton.executable import TritonExecutable
from moec.backends.triton.graphs import GraphedExecutable
from moec.backends.triton.prepare import Prepared
from moec.backends.triton.store import HERE, Entry, key_of, record
from moec.progress import show_progress

BATCHES = 4
"""Inputs that take turns, so that what one call read is not in the cache for the next."""
ROUNDS = 3
USUAL = (1, 8, 64, 512, 4096)
"""Numbers of tokens that are tuned where none are named; plans hold for the numbers around them."""
REST = 0.05
"""Seconds of rest before each plan is timed."""
WORTH = 0.99
"""A plan replaces another if it takes less than this share of its time; less is noise."""
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass
class Found:
    """The outcome for one number of tokens; microseconds."""

    entry: Entry
    before: Plan
    """What ran without this result."""
    before_us: float
    tried: int
    failed: int
    """Plans that did not compile or did not fit the GPU."""


@dataclass(frozen=True)
class Tunable:
    """One kind of layer: kernels prepared for one of its layers, and how many experts a token has."""

    key: str
    prepared: Prepared
    k: int


def tunable(executables: Iterable[object]) -> list[Tunable]:
    """The kinds of layers in these executables, each once."""
    found: dict[str, Tunable] = {}
    for executable in executables:
        inner = executable.inner if isinstance(executable, GraphedExecutable) else executable
        for fused in inner.fused if isinstance(inner, TritonExecutable) else ():
            prepared = fused.prepared_for(torch.device("cuda", torch.cuda.current_device()))
            if prepared is not None:
                key = key_of(prepared.shape, fused.k)
                found.setdefault(key, Tunable(key, prepared, fused.k))
    return list(found.values())


def tune_new(executable: TritonExecutable) -> None:
    """Measure and keep the plans of usual numbers of tokens for which this machine has none."""
    gpu = torch.cuda.get_device_name()
    with show_progress("tune") as say, torch.no_grad():
        for layer in tunable([executable]):
            new = [count for count in USUAL if layer.prepared.plan(count, layer.k).origin != HERE]
            for count in new:
                found = tune(layer.prepared, layer.k, count, partial(_say, say, f"{layer.key}, T={count}"))
                # Kept one by one: whoever loses patience keeps what was found.
                record([found.entry], gpu)
            layer.prepared.forget()


def _say(say: Callable[[str], None], what: str, text: str) -> None:
    say(f"{what}: {text}")


def tune(prepared: Prepared, k: int, tokens: int, step: Callable[[str], None] = lambda text: None) -> Found:
    """The fastest plan found for a layer and a number of tokens, on the current device."""
    search = _Search(prepared, _inputs(prepared, k, tokens), step)
    before = prepared.plan(tokens, k)
    start = [*dict.fromkeys((before._replace(origin=HERE), *paths(prepared.shape, tokens, k, prepared.facts)))]
    before_us = search.time(start[0])
    # Each path from its own start; the best of them goes on to tiles with other numbers of rows.
    best = min((search.descend(plan) for plan in start), key=search.time)
    for rows in row_counts(best):
        assert isinstance(best.first, Tile)
        assert isinstance(best.second, Tile)
        other = best._replace(first=best.first._replace(bm=rows), second=best.second._replace(bm=rows))
        other = search.descend(other)
        if search.time(other) < WORTH * search.time(best):
            best = other
    entry = Entry(key_of(prepared.shape, k), tokens, best, search.time(best))
    return Found(entry, before, before_us, len(search.times), search.failed)


class _Search:
    """Times plans, each once."""

    def __init__(self, prepared: Prepared, batches: list[Inputs], step: Callable[[str], None]) -> None:
        self.prepared, self.batches, self.step = prepared, batches, step
        self.times: dict[Plan, float] = {}
        self.failed = 0

    def time(self, plan: Plan) -> float:
        """Microseconds a call; infinity for a plan that cannot run."""
        if plan not in self.times:
            self.step(str(plan))
            try:
                self.times[plan] = self._measure(plan)
            except Exception:  # whatever the compiler or the launch says: this plan is not for this GPU
                self.failed += 1
                self.times[plan] = float("inf")
        return self.times[plan]

    def descend(self, plan: Plan) -> Plan:
        """The best by changing the first product's shape, then the second's."""
        for name in ("first", "second"):
            for other in self._near(plan, name):
                if self.time(other) < WORTH * self.time(plan):
                    plan = other
        return plan

    def _near(self, plan: Plan, name: str) -> Iterator[Plan]:
        part: Rows | Tile = getattr(plan, name)
        size = self.prepared.shape.dtype.itemsize
        facts = self.prepared.facts
        shapes: Iterator[Rows | Tile]
        shapes = rows_near(part) if isinstance(part, Rows) else tiles_near(part, plan.path, size, facts)
        for shape in shapes:
            yield plan._replace(first=shape) if name == "first" else plan._replace(second=shape)

    def _measure(self, plan: Plan) -> float:
        # A GPU that has just worked at its power limit is slower than one that rests: all plans start rested.
        time.sleep(REST)

        def go() -> None:
            for batch in self.batches:
                self.prepared(*batch, plan=plan)

        go()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            go()
        return _repeated(graph.replay) / len(self.batches)


def _repeated(go: Callable[[], object], least: float = 3e3) -> float:
    """Microseconds a call: the median of rounds of at least `least` microseconds each."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def once(times: int) -> float:
        start.record()
        for _ in range(times):
            go()
        end.record()
        end.synchronize()
        return 1e3 * float(start.elapsed_time(end)) / times

    once(1)
    times = max(1, int(least / max(once(1), 1.0)))
    return statistics.median(once(times) for _ in range(ROUNDS))


def _inputs(prepared: Prepared, k: int, tokens: int) -> list[Inputs]:
    """Random tokens with slightly uneven routing, the same on every run."""
    layer, device = prepared.layer, prepared.device
    found = []
    for seed in range(BATCHES if tokens <= 1024 else 2):
        generator = torch.Generator(device).manual_seed(seed)
        scores = torch.randn(tokens, layer.experts, device=device, generator=generator)
        scores += 0.3 * torch.randn(layer.experts, device=device, generator=generator)
        top = scores.topk(min(k, layer.experts), dim=1)
        x = torch.randn(tokens, layer.d, device=device, generator=generator).to(layer.dtype)
        found.append((x, top.indices.int(), top.values.softmax(1)))
    return found
