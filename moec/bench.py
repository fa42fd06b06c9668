"""Latency before and after: interleaved runs, so that both sides see the same machine; medians and spread.

T tokens, D model width, K experts per token.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from moec.benchinputs import tensor_inputs
from moec.benchresult import BenchResult, Row, Timing
from moec.environment import machine, versions
from moec.errors import MoecError
from moec.loading import Inputs, token_inputs
from moec.progress import Progress, Silent
from moec.report import LayerReport, Report


@dataclass(frozen=True)
class Effort:
    """How long to time one pair: until seconds are spent, within min_runs and max_runs of each side."""

    seconds: float = 1.0
    min_runs: int = 5
    max_runs: int = 200
    warmup: int = 2


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a layer."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def compare(before: Callable[[], object], after: Callable[[], object], effort: Effort) -> tuple[Timing, Timing]:
    """Time two functions in turns, changing who goes first each time, so that drift and caches favour neither."""
    sync = _synchronizer()
    for _ in range(effort.warmup):
        before()
        after()
    times: tuple[list[float], list[float]] = ([], [])
    stop = time.perf_counter() + effort.seconds
    while len(times[0]) < effort.min_runs or (len(times[0]) < effort.max_runs and time.perf_counter() < stop):
        turn = len(times[0]) % 2
        for side in (turn, 1 - turn):
            function = (before, after)[side]
            sync()
            start = time.perf_counter()
            function()
            sync()
            times[side].append((time.perf_counter() - start) * 1e3)
    return timing(times[0]), timing(times[1])


def timing(milliseconds: Sequence[float]) -> Timing:
    """Median and the 10th and 90th percentile of some runs."""
    ordered = sorted(milliseconds)
    last = len(ordered) - 1
    return Timing(
        median_ms=statistics.median(ordered),
        p10_ms=ordered[round(0.1 * last)],
        p90_ms=ordered[round(0.9 * last)],
        runs=len(ordered),
    )


@dataclass
class Bench:
    """One model before and after compilation, timed layer by layer and end to end.

    make_inputs gives the model's inputs for a number of tokens; without it, example_inputs are captured once, layers
    get their rows repeated or cut to each number of tokens, and the model is timed on the example alone.
    """

    before: nn.Module
    after: nn.Module
    report: Report
    make_inputs: Callable[[int], Inputs] | None = None
    example_inputs: Inputs | None = None
    effort: Effort = field(default_factory=Effort)
    every_layer: bool = False
    progress: Progress = field(default_factory=Silent)

    def run(self, tokens: Sequence[int]) -> BenchResult:
        """Rows for each group of like layers and each number of tokens, then for the whole model."""
        if self.make_inputs is None and self.example_inputs is None:
            raise MoecError(
                "MOEC605",
                f"cannot guess the inputs of {type(self.before).__name__}",
                hint="pass example_inputs to compile, or let the factory return (model, make_inputs)",
            )
        groups = like_layers(self.report, every=self.every_layer)
        fallbacks = [layer.fallbacks for layer in self.report.layers]
        result = BenchResult(machine=machine(), versions=versions(), settings=self._settings())
        with torch.no_grad():
            calls = capture(self.before, [group[0].name for group in groups], self._inputs(max(tokens)))
            for group in groups:
                self._layer_rows(group, calls.get(group[0].name), tokens, result)
            self._model_rows(tokens, calls, result)
        for layer, count in zip(self.report.layers, fallbacks, strict=True):
            if layer.fallbacks > count:
                note = f"{layer.name}: {layer.fallbacks - count} timed calls fell back to the original forward"
                result.notes.append(note)
        return result

    def steps(self, tokens: Sequence[int]) -> int:
        """How many times run() reports progress."""
        ends = len(tokens) if self.make_inputs is not None else 1
        return len(like_layers(self.report, every=self.every_layer)) * len(tokens) + ends

    def _inputs(self, tokens: int) -> Inputs:
        if self.make_inputs is not None:
            return self.make_inputs(tokens)
        assert self.example_inputs is not None
        return self.example_inputs

    def _layer_rows(
        self, group: Sequence[LayerReport], call: Call | None, tokens: Sequence[int], result: BenchResult
    ) -> None:
        layer = group[0]
        if call is None:
            result.notes.append(f"{layer.name}: not timed, the model did not call it on these inputs")
            return
        old, new = self.before.get_submodule(layer.name), self.after.get_submodule(layer.name)
        for count in tokens:
            self.progress.step(f"{layer.name or 'the layer'} at T={count}")
            sized = resize(call, count)
            if isinstance(sized, str):
                result.notes.append(f"{layer.name}: not timed at T={count}, {sized}")
                continue
            pair = compare(_caller(old, sized), _caller(new, sized), self.effort)
            others = tuple(other.name for other in group[1:])
            result.rows.append(Row(layer.name, layer.kind, count, pair[0], pair[1], others))

    def _model_rows(self, tokens: Sequence[int], calls: Mapping[str, Call], result: BenchResult) -> None:
        if any(layer.name == "" for layer in self.report.layers):
            return  # the layer is the model
        for count in tokens if self.make_inputs is not None else [_most_rows(calls)]:
            self.progress.step(f"whole model at T={count}")
            call = as_call(self._inputs(count))
            pair = compare(_caller(self.before, call), _caller(self.after, call), self.effort)
            result.rows.append(Row("whole model", "model", count, pair[0], pair[1]))

    def _settings(self) -> dict[str, Any]:
        parameter = next(self.before.parameters(), None)
        return {
            "model": type(self.before).__name__,
            "dtype": "-" if parameter is None else str(parameter.dtype).removeprefix("torch."),
            "device": "-" if parameter is None else str(parameter.device),
            "threads": torch.get_num_threads(),
            "seconds_per_pair": self.effort.seconds,
            "warmup_runs": self.effort.warmup,
        }


def measure_report(
    before: nn.Module, after: nn.Module, report: Report, tokens: Sequence[int], example_inputs: Inputs | None = None
) -> None:
    """Time both models and fill in the report's latencies. Token ids are made where the model reads them; otherwise
    example_inputs are used, and without any, tensors as wide as the layers."""
    make_inputs = token_inputs(before)
    if make_inputs is None and example_inputs is None:
        make_inputs = tensor_inputs(before, report)
    timer = Bench(before, after, report, make_inputs=make_inputs, example_inputs=example_inputs)
    timer.run(tokens).fill(report)


def like_layers(report: Report, *, every: bool = False) -> list[list[LayerReport]]:
    """Compiled layers in groups that run the same program; timing one of a group tells about all."""
    groups: dict[object, list[LayerReport]] = {}
    for layer in report.compiled:
        program = layer.ir_after.replace(layer.name, "") if layer.name else layer.ir_after
        groups.setdefault(layer.name if every or not program else (layer.kind, layer.cut, program), []).append(layer)
    return list(groups.values())


def as_call(inputs: Inputs) -> Call:
    return Call((), dict(inputs)) if isinstance(inputs, Mapping) else Call(tuple(inputs), {})


def capture(model: nn.Module, names: Sequence[str], inputs: Inputs) -> dict[str, Call]:
    """Run the model once and keep what each named layer was first called with; hooks are gone afterwards."""
    calls: dict[str, Call] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name not in calls:  # cloned, because what follows the layer may write into its input
                calls[name] = Call(tuple(map(_clone, args)), {key: _clone(value) for key, value in kwargs.items()})

        return hook

    call = as_call(inputs)
    hooks = [model.get_submodule(name).register_forward_pre_hook(keep(name), with_kwargs=True) for name in names]
    try:
        model(*call.args, **call.kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def resize(call: Call, tokens: int) -> Call | str:
    """The call with its rows repeated or cut to tokens; a reason where that cannot be done.

    Rows are recognised by the first floating-point argument x[T, D] or x[B, S, D]; experts[T, K], weights[T, K] and
    token ids of the same number of rows follow it.
    """
    rows = _num_rows(call)
    if rows is None:
        return "its arguments hold no x[T, D] or x[B, S, D]"
    if rows == 0:
        return "it was called with no rows"
    if rows == tokens:
        return call
    return Call(
        tuple(_resize(value, rows, tokens) for value in call.args),
        {key: _resize(value, rows, tokens) for key, value in call.kwargs.items()},
    )


def _num_rows(call: Call) -> int | None:
    for value in (*call.args, *call.kwargs.values()):
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() in (2, 3):
            return value.shape[:-1].numel()
    return None


def _resize(value: Any, rows: int, tokens: int) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    index = torch.arange(tokens, device=value.device) % rows
    if value.dim() in (2, 3) and value.shape[:-1].numel() == rows:
        resized = value.reshape(rows, value.shape[-1])[index]
        return resized.unsqueeze(0) if value.dim() == 3 else resized
    if value.dim() in (1, 2) and value.numel() == rows:
        resized = value.reshape(rows)[index]
        return resized.unsqueeze(0) if value.dim() == 2 else resized
    return value


def _most_rows(calls: Mapping[str, Call]) -> int:
    return max((_num_rows(call) or 0 for call in calls.values()), default=0)


def _caller(module: nn.Module, call: Call) -> Callable[[], object]:
    return lambda: module(*call.args, **call.kwargs)


def _clone(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _synchronizer() -> Callable[[], None]:
    """Waits for the accelerator, where there is one: its work is asynchronous."""
    if torch.accelerator.is_available():
        return torch.accelerator.synchronize
    return lambda: None
