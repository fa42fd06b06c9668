"""Exported Mixtrals of one layer in ONNX Runtime on this CPU: transformers' own export beside moec's, in turns.

Contestants: transformers' exporter with its grouped experts, moec.export in fp32 and in int8, and transformers' file
rewritten by moec. Beside the medians: errors against PyTorch, sizes and load times.

    python examples/benchmarks/onnx_experts.py [--layers E8k2D1024F3584 ...] [--tokens 1 32 256] [--rounds 9]
                                               [--threads 2] [--cpu-time]

Behind the table it says which of the project's goals these numbers meet. `--cpu-time` counts what the process used
instead of what the clock says: with one thread, that is steadier on a machine with other work.

T tokens, K experts per token, E experts, D model width, F expert width.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import transformers

import moec
from moec.environment import machine, versions
from moec.table import milliseconds, size, table

LAYERS = ("E8k2D1024F3584", "E64k8D1024F512")
FP32, INT8 = "moec, from PyTorch", "moec, int8"
# How many times faster than transformers' export int8 should be on the first layer, by tokens.
GOALS = {1: 2.2, 32: 3.0, 256: 2.7}
MOST_ERROR = 3.5e-2
THEIRS = "transformers' export"


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
    found = re.fullmatch(r"E(\d+)k(\d+)D(\d+)F(\d+)", layer)
    assert found is not None, f"{layer!r} is no layer; write it like {LAYERS[0]}"
    experts, k, width, hidden = map(int, found.groups())
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


def medians(calls: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Milliseconds of each, all of them in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for turn in range(rounds + 2):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            # Threads of the one before may still be spinning.
            time.sleep(0.01)
            start = clock()
            calls[name]()
            if turn > 1:
                times[name].append((clock() - start) * 1e3)
    return {name: statistics.median(found) for name, found in times.items()}


@dataclass(frozen=True)
class Row:
    """One file at one number of tokens."""

    layer: str
    tokens: int
    file: str
    ms: float
    faster: float
    """Than transformers' export."""
    error: float
    size: int
    load: float

    def cells(self) -> list[str]:
        numbers = [
            milliseconds(self.ms),
            f"{self.faster:.2f}x",
            f"{self.error:.1e}",
            size(self.size),
            f"{self.load:.2f}",
        ]
        return [self.layer, str(self.tokens), self.file, *numbers]


def measure(layer: str, tokens: Sequence[int], rounds: int, threads: int, clock: Callable[[], float]) -> Iterator[Row]:
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
            calls = {
                name: lambda s=session: s.run(["logits"], {"input_ids": ids.numpy()})  # type: ignore[misc]  # noqa: B023
                for name, (session, _) in sessions.items()
            }
            found = medians(calls, rounds, clock)
            for name, ms in found.items():
                error = float((torch.from_numpy(calls[name]()[0]) - exact).norm() / exact.norm())
                yield Row(layer, count, name, ms, found[THEIRS] / ms, error, sizes[name], sessions[name][1])


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
    how = (arguments.tokens, arguments.rounds, arguments.threads, clock)
    rows = [row for layer in arguments.layers for row in measure(layer, *how)]
    headers = ["layer", "tokens", "file", "ms", "faster", "error", "size", "load s"]
    right = ["tokens", "ms", "faster", "error", "size", "load s"]
    print(table(headers, [row.cells() for row in rows], right=right))
    print("\n" + table(["goal", "at least", "is", ""], goals(rows), right=["at least", "is"]))
    print(f"\n{machine()}, {arguments.threads} threads" + ", CPU time" * arguments.cpu_time)
    print(", ".join(f"{name} {version}" for name, version in versions().items()))


if __name__ == "__main__":
    main()
