"""Measure which kernels are fastest for the layers of a model on this machine's GPU, and keep the results.

Compiled models use them from then on, on this machine. Without results, plans that moec ships for the GPU or a model of
cost decide; they are measured too, so the table says what tuning gained. Changes speed only, never results.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moec.commands.arguments import counts
from moec.commands.model import add_model_arguments, load, nothing_found
from moec.errors import MoecError
from moec.jsontext import dumps
from moec.progress import show_progress
from moec.table import table
from moec.writing import check_writable

if TYPE_CHECKING:
    from moec.backends.triton.tune import Found, Tunable

USUAL = (1, 8, 64, 512, 4096)
HELP = "measure which kernels are fastest on this GPU"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--tokens",
        type=counts,
        default=USUAL,
        metavar="T,T,...",
        help="numbers of tokens; default 1,8,64,512,4096",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="keep the results here, not in the cache")


def run(arguments: argparse.Namespace) -> int:
    if arguments.output is not None:
        check_writable(arguments.output)
    import torch

    from moec import api
    from moec.backendbase import why_not

    why = why_not("triton", torch.device("cuda"))
    if why:
        raise MoecError("MOEC408", f"nothing to tune: {why}", hint="moec tune needs an NVIDIA GPU and triton")
    loaded = load(arguments)
    model = loaded.model.to("cuda")
    compiled = api.compile(model, backend="triton", inplace=True)
    report = compiled.moec.report
    if not report.compiled:
        print(report, file=sys.stderr)
        raise nothing_found(loaded)
    from moec.backends.triton.store import record
    from moec.backends.triton.tune import tunable

    layers = tunable(method.ready() for method in api.compiled_methods(compiled))
    with show_progress("tune") as say, torch.no_grad():
        found = list(_tune_all(layers, arguments.tokens, say))
    path = record([one.entry for one in found], torch.cuda.get_device_name(), arguments.output)
    if arguments.json:
        print(dumps({"gpu": torch.cuda.get_device_name(), "file": str(path), "results": [_row(one) for one in found]}))
    else:
        print(_table(found), f"kept in {path}", sep="\n\n")
    return 0


def _tune_all(layers: Iterable[Tunable], tokens: Iterable[int], say: Callable[[str], None]) -> Iterable[Found]:
    from moec.backends.triton.tune import tune

    for layer in layers:
        for count in tokens:
            name = f"{layer.key}, T={count}"
            yield tune(layer.prepared, layer.k, count, lambda text, name=name: say(f"{name}: {text}"))  # type: ignore[misc]


def _row(found: Found) -> dict[str, Any]:
    return {
        **found.entry.to_json(),
        "before": str(found.before),
        "before_us": round(found.before_us, 2),
        "tried": found.tried,
        "failed": found.failed,
    }


def _table(results: Iterable[Found]) -> str:
    headers = ["layer", "tokens", "before", "us", "after", "us ", "faster"]
    rows = []
    for one in results:
        entry = one.entry
        times = (f"{one.before_us:.1f}", f"{entry.us:.1f}", f"{one.before_us / entry.us:.2f}x")
        rows.append([entry.key, str(entry.tokens), str(one.before), times[0], str(entry.plan), times[1], times[2]])
    return table(headers, rows, right=["tokens", "us", "us ", "faster"])
