"""CUDA graphs that moec owns: a region captured once for each bucket of token counts, and replayed from then on.

A replay costs the host one launch however many kernels the region has. T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch

from moec.backends.triton.executable import TritonExecutable
from moec.ir import (
    Act,
    Add,
    ConcatWeights,
    DenseFfn,
    ExpertFfn,
    Glu,
    Linear,
    Mul,
    Norm,
    Op,
    QuantizeWeight,
    Region,
    Route,
    SelectExperts,
    Weight,
)

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Rows that a graph is captured for; beyond the last, kernels take so long that the host keeps ahead of them."""
MOST_GRAPHS = 64
"""Graphs kept for one region, all devices and streams together; all are dropped when there are more."""
WARM_UPS = 2
"""Calls before a capture: kernels are compiled and loaded by then, which no capture may do."""
# Ops whose results for one token do not depend on the other tokens: rows that fill up a bucket do not disturb them.
_BY_ROW = (Act, Add, ConcatWeights, DenseFfn, ExpertFfn, Glu, Linear, Mul, Norm, QuantizeWeight, Route, SelectExperts)


def by_row(region: Region) -> bool:
    """Whether every input and output has its rows in step, and every op takes them one by one."""
    values = [*region.inputs, *region.outputs]
    if not values or any(value.type.rank == 0 for value in values):
        return False
    rows = {value.type.shape[0] for value in values}
    return len(rows) == 1 and rows.pop().constant is None and all(_takes_rows(node.op) for node in region.nodes)


def _takes_rows(op: Op) -> bool:
    return isinstance(op, (Weight, *_BY_ROW)) and not (isinstance(op, Norm) and op.offsets is not None)


@dataclass
class _Graph:
    """One capture, the buffers it reads and writes, and when the last replay was done with them."""

    graph: torch.cuda.CUDAGraph
    inputs: list[torch.Tensor]
    fills: list[int]
    """What rows of the buffers hold that fill up a bucket."""
    outputs: tuple[torch.Tensor, ...]
    done: torch.cuda.Event
    lock: Any = field(default_factory=Lock)

    def replay(self, inputs: Sequence[torch.Tensor], rows: int) -> tuple[torch.Tensor, ...]:
        """The region's outputs for inputs of so many rows, at most those of the buffers."""
        with self.lock:
            torch.cuda.current_stream().wait_event(self.done)
            for buffer, given, fill in zip(self.inputs, inputs, self.fills, strict=True):
                if rows < buffer.shape[0]:
                    buffer[:rows].copy_(given)
                    # What an earlier call left may be any tokens, but their experts must not be read for nothing.
                    if fill:
                        buffer[rows:].fill_(fill)
                else:
                    buffer.copy_(given)
            self.graph.replay()
            outputs = tuple(output[:rows].clone() for output in self.outputs)
            self.done.record()
        return outputs


class GraphedExecutable:
    """Runs a region by graphs where it can, else as the executable within does."""

    def __init__(self, inner: TritonExecutable, region: Region) -> None:
        self.inner = inner
        # An index of -1 is no expert.
        self._fills = [-1 if value.type.dtype in ("i32", "i64") else 0 for value in region.inputs]
        self._why = "" if by_row(region) else "its rows depend on each other, so buckets would change results"
        if inner.straight:
            # Measured on an H100: 30 to 60 us of launches against 70 for three copies, a replay and a clone.
            self._why = "a call is a few launches, which take less time than the copies around a replay"
        self._graphs: dict[Any, _Graph] = {}
        self._kept: object = None
        self._lock = Lock()

    @property
    def nbytes_packed(self) -> int:
        """Bytes of copies of weights."""
        return self.inner.nbytes_packed

    def describe(self) -> str:
        """What the executable within runs, and the graphs there are."""
        if self._why:
            return f"{self.inner.describe()}\nno CUDA graphs: {self._why}"
        buckets = sorted({key[0] for key in self._graphs})
        captured = f", captured: {', '.join(map(str, buckets))}" if buckets else ""
        return f"{self.inner.describe()}\nCUDA graphs for up to {BUCKETS[-1]} tokens{captured}"

    def tune(self) -> None:
        """Measure plans, as the executable within does; graphs of other plans go."""
        self.inner.tune()
        self._graphs.clear()

    def refresh(self) -> None:
        """Make packed copies anew; graphs that read the old ones go."""
        self._graphs.clear()
        self.inner.refresh()

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The region's outputs. Raises what the executable within raises."""
        if self._why or not inputs or not self._takes(inputs):
            return self.inner(*inputs)
        rows = inputs[0].shape[0]
        kept = self.inner.kept()
        if kept is not self._kept:
            with self._lock:
                self._graphs.clear()
                self._kept = kept
        bucket = next(size for size in BUCKETS if size >= rows)
        key = (bucket, torch.cuda.current_stream().cuda_stream, *((t.dtype, t.shape[1:], t.device) for t in inputs))
        found = self._graphs.get(key)
        if found is None:
            with self._lock:
                found = self._graphs.get(key) or self._capture(key, inputs, bucket)
        return found.replay(inputs, rows)

    def _takes(self, inputs: Sequence[torch.Tensor]) -> bool:
        """Whether these may be run by a graph: on one GPU, few and equal rows, and no capture under way."""
        first = inputs[0]
        if not first.is_cuda or first.device.index != torch.cuda.current_device():
            return False
        rows = first.shape[0] if first.dim() else 0
        same = all(t.is_cuda and t.dim() and t.shape[0] == rows for t in inputs)
        return same and 0 < rows <= BUCKETS[-1] and not torch.cuda.is_current_stream_capturing()

    def _capture(self, key: Any, inputs: Sequence[torch.Tensor], bucket: int) -> _Graph:
        # Buffers made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            return self._capture_plainly(key, inputs, bucket)

    def _capture_plainly(self, key: Any, inputs: Sequence[torch.Tensor], bucket: int) -> _Graph:
        buffers = []
        for given, fill in zip(inputs, self._fills, strict=True):
            buffer = given.new_full((bucket, *given.shape[1:]), fill)
            buffer[: given.shape[0]].copy_(given)
            buffers.append(buffer)
        current = torch.cuda.current_stream()
        side = torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side), torch.no_grad():
            for _ in range(WARM_UPS):
                self.inner(*buffers)
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on working with the device while this one captures.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                outputs = self.inner(*buffers)
        current.wait_stream(side)
        done = torch.cuda.Event()
        done.record(current)
        if len(self._graphs) >= MOST_GRAPHS:
            self._graphs.clear()
        made = self._graphs[key] = _Graph(graph, buffers, self._fills, outputs, done)
        return made
