"""Exported Mixtrals of one layer in ONNX Runtime on this CPU: transformers' own export beside moec's, in turns.

Contestants: transformers' exporter with its grouped experts, moec.export in fp32 and in int8, and transformers' file
rewritten by moec. Beside the medians: errors against PyTorch, sizes and load times.

    python examples/benchmarks/onnx_experts.py [--layers E8k2D1024F3584 ...] [--tokens 1 32 256] [--rounds 9]
                                               [--threads 2] [--cpu-time]

Behind the table it says which of the project's goals these numbers meet, and how far the runs of one file lie apart:
where that is wide, the machine had other work, and medians of few rounds say little. `floor ms` is the least that the
experts may take: reading the weights of those that are hit, or their products at the highest rate that ONNX Runtime
reaches here, whichever is longer; what surrounds them comes on top. `--cpu-time` counts what the process used instead
of what the clock says: with one thread, that is steadier on a machine with other work.

T tokens, K experts per token, E experts, D model width, F expert width.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import transformers
from onnx_floors import Machine, best_here, sizes_of

import moec
from moec.environment import machine, versions
from moec.table import milliseconds, size, table

LAYERS = ("E8k2D1024F3584", "E64k8D1024F512")
FP32, INT8 = "moec, from PyTorch", "moec, int8"
# How many times faster than transformers' export int8 should be on the first layer, by tokens.
GOALS = {1: 2.2, 32: 3.0, 256: 2.7}
MOST_ERROR = 3.5e-2
THEIRS = "transformers' export"
# Runs of one file that lie further apart than this, last decile over first, say that the machine had other work.
STEADY = 1.15


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def mixtral(layer: str) -> Any:
    """One layer of Mixtral with random weights, and a small vocabulary, so that its experts are most of the work."""
    experts, k, width, hidden = sizes_of(layer)
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=4,
        num_local_experts=experts,
        num_experts_per_tok=k,
    )
    model = transformers.MixtralForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def exported(model: Any, folder: Path) -> dict[str, Path]:
    """The contestants' files. moec's are checked before they appear."""
    from transformers.exporters import OnnxConfig, OnnxExporter

    ids = torch.randint(3, 1000, (2, 16))
    files = {THEIRS: folder / "theirs" / "model.onnx"}
    with quiet():
        model.set_experts_implementation("grouped_mm")
        OnnxExporter().export(model, {"input_ids": ids}, config=OnnxConfig(dynamic=True)).save_pretrained(
            folder / "theirs"
        )
        model.set_experts_implementation("eager")
    for name, source, options in (
        (FP32, model, {}),
        (INT8, model, {"quantize": "int8"}),
        ("moec, their file rewritten", files[THEIRS], {}),
    ):
        files[name] = folder / f"{len(files)}.onnx"
        moec.export(source, files[name], None if source is not model else {"input_ids": ids}, **options)
    return files


def loaded(path: Path, threads: int) -> tuple[Any, float]:
    """A session with ONNX Runtime's defaults, and the seconds it took."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    start = time.perf_counter()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session, time.perf_counter() - start


def timed(calls: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Milliseconds of each, all of them in turns, ascending."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for turn in range(rounds + 2):
        # Always in one order: whoever ran twice in a row would find its weights in the caches.
        for name in order:
            # Threads of the one before may still be spinning.
            time.sleep(0.01)
            start = clock()
            calls[name]()
            if turn > 1:
                times[name].append((clock() - start) * 1e3)
    return {name: sorted(found) for name, found in times.items()}


@dataclass(frozen=True)
class Row:
    """One file at one number of tokens."""

    layer: str
    tokens: int
    file: str
    ms: float
    """The median."""
    least: float
    spread: float
    """The last decile over the first."""
    faster: float
    """Than transformers' export, by medians."""
    faster_least: float
    """The same by the fastest runs of both."""
    floor: float
    """Milliseconds that the experts take at least; see `Machine.floor`."""
    error: float
    size: int
    load: float

    def cells(self) -> list[str]:
        numbers = [
            milliseconds(self.ms),
            milliseconds(self.least),
            f"{self.spread:.2f}",
            f"{self.faster:.2f}x",
            f"{self.faster_least:.2f}x",
            milliseconds(self.floor),
            f"{self.error:.1e}",
            size(self.size),
            f"{self.load:.2f}",
        ]
        return [self.layer, str(self.tokens), self.file, *numbers]


def measure(
    layer: str, tokens: Sequence[int], rounds: int, threads: int, clock: Callable[[], float], best: Machine
) -> Iterator[Row]:
    """A row for each contestant and number of tokens."""
    model = mixtral(layer)
    with tempfile.TemporaryDirectory(prefix="moec-") as folder:
        files = exported(model, Path(folder))
        sessions = {name: loaded(path, threads) for name, path in files.items()}
        sizes = {name: sum(f.stat().st_size for f in path.parent.glob(path.name + "*")) for name, path in files.items()}
        for count in tokens:
            ids = torch.randint(3, 1000, (1, count))
            with torch.no_grad():
                exact = model(input_ids=ids, use_cache=False).logits
            feed = {"input_ids": ids.numpy()}
            calls: dict[str, Callable[[], Any]] = {
                name: partial(session.run, ["logits"], feed) for name, (session, _) in sessions.items()
            }
            # Single tokens take a millisecond or two, and vary most.
            found = timed(calls, rounds * (5 if count < 8 else 1), clock)
            theirs = found[THEIRS]
            for name, times in found.items():
                error = float((torch.from_numpy(calls[name]()[0]) - exact).norm() / exact.norm())
                ms, spread = statistics.median(times), times[len(times) * 9 // 10] / times[len(times) // 10]
                faster = statistics.median(theirs) / ms, theirs[0] / times[0]
                floor = best.floor(layer, count, int8=name == INT8)
                cost = sizes[name], sessions[name][1]
                yield Row(layer, count, name, ms, times[0], spread, *faster, floor, error, *cost)


def goals(rows: Sequence[Row]) -> list[list[str]]:
    """What each number should be, what it is, and whether that is met."""
    faster = {(row.layer, row.tokens, row.file): row.faster for row in rows}
    found = []

    def goal(what: str, is_: float, least: float) -> None:
        found.append([what, f"{least:.2f}", f"{is_:.2f}", "met" if is_ >= least else "missed"])

    for (layer, tokens, file), times in faster.items():
        if file == FP32:
            goal(f"{layer}, T={tokens}: fp32 over transformers' export", times, 1.0)
        elif file == INT8:
            if layer == LAYERS[0] and tokens in GOALS:
                goal(f"{layer}, T={tokens}: int8 over transformers' export", times, GOALS[tokens])
            goal(f"{layer}, T={tokens}: int8 over moec's fp32", times / faster[layer, tokens, FP32], 1.0)
    errors = [row.error for row in rows if row.file == INT8]
    if errors:
        verdict = "met" if max(errors) <= MOST_ERROR else "missed"
        found.append(["largest error of int8, at most", f"{MOST_ERROR:.1e}", f"{max(errors):.1e}", verdict])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", default=list(LAYERS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 32, 256])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    best = best_here(arguments.threads)
    torch.set_num_threads(arguments.threads)
    how = (arguments.tokens, arguments.rounds, arguments.threads, clock, best)
    rows = [row for layer in arguments.layers for row in measure(layer, *how)]
    right = ["tokens", "ms", "least", "p90/p10", "faster", "by least", "floor ms", "error", "size", "load s"]
    headers = ["layer", right[0], "file", *right[1:]]
    print(table(headers, [row.cells() for row in rows], right=right))
    print("\n" + table(["goal", "at least", "is", ""], goals(rows), right=["at least", "is"]))
    print(f"\n{machine()}, {arguments.threads} threads" + ", CPU time" * arguments.cpu_time)
    rates = f"{best.exact / 1e9:.0f} GFLOP/s in fp32, {best.int8 / 1e9:.0f} Gop/s in int8"
    print(f"at best {best.bandwidth / 1e9:.0f} GB/s from memory, {rates} (clock)")
    unsteady = sum(row.spread > STEADY for row in rows)
    print(f"{unsteady} of {len(rows)} rows vary by more than {STEADY} between their first and last decile")
    print(", ".join(f"{name} {version}" for name, version in versions().items()))


if __name__ == "__main__":
    main()
