"""Exported Mixtrals of one layer in ONNX Runtime on this CPU: transformers' own export beside moec's, in turns.

Contestants: transformers' exporter with its grouped experts, moec.export in fp32 and in int8, and transformers' file
rewritten by moec. Beside the medians: errors against PyTorch, sizes and load times.

    python examples/benchmarks/onnx_experts.py [--layers E8k2D1024F3584 ...] [--tokens 1 32 256] [--rounds 9]

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
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import transformers

import moec
from moec.environment import machine, versions
from moec.table import milliseconds, size, table

LAYERS = ("E8k2D1024F3584", "E64k8D1024F512")
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
        ("moec, from PyTorch", model, {}),
        ("moec, int8", model, {"quantize": "int8"}),
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


def medians(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Milliseconds of each, all of them in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for turn in range(rounds + 2):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            # Threads of the one before may still be spinning.
            time.sleep(0.01)
            start = time.perf_counter()
            calls[name]()
            if turn > 1:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(found) for name, found in times.items()}


def measure(layer: str, tokens: Sequence[int], rounds: int) -> list[list[str]]:
    """A row for each contestant and number of tokens."""
    model = mixtral(layer)
    rows = []
    with tempfile.TemporaryDirectory(prefix="moec-") as folder:
        files = exported(model, Path(folder))
        sessions = {name: loaded(path, torch.get_num_threads()) for name, path in files.items()}
        sizes = {name: sum(f.stat().st_size for f in path.parent.glob(path.name + "*")) for name, path in files.items()}
        for count in tokens:
            ids = torch.randint(3, 1000, (1, count))
            with torch.no_grad():
                exact = model(input_ids=ids, use_cache=False).logits
            calls = {
                name: lambda s=session: s.run(["logits"], {"input_ids": ids.numpy()})  # type: ignore[misc]  # noqa: B023
                for name, (session, _) in sessions.items()
            }
            found = medians(calls, rounds)
            for name, value in found.items():
                error = float((torch.from_numpy(calls[name]()[0]) - exact).norm() / exact.norm())
                faster = f"{found[THEIRS] / value:.2f}x"
                about = [size(sizes[name]), f"{sessions[name][1]:.2f}"]
                rows.append([layer, str(count), name, milliseconds(value), faster, f"{error:.1e}", *about])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", default=list(LAYERS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 32, 256])
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rows = [row for layer in arguments.layers for row in measure(layer, arguments.tokens, arguments.rounds)]
    headers = ["layer", "tokens", "file", "ms", "faster", "error", "size", "load s"]
    print(table(headers, rows, right=["tokens", "ms", "faster", "error", "size", "load s"]))
    print("\n" + machine())
    print(", ".join(f"{name} {version}" for name, version in versions().items()))


if __name__ == "__main__":
    main()
