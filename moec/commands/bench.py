"""Latency before and after compilation, per layer and end to end, over a list of token counts.

Runs are interleaved (before, after, after, before, ...) after a warm-up; the table has medians and the 10th and 90th
percentile. Layers that run the same program are timed once. Nothing is written unless the model compiled and ran.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from moec.commands.arguments import counts, positive, seconds
from moec.commands.model import add_model_arguments, load, nothing_found
from moec.errors import MoecError
from moec.loading import Loaded
from moec.progress import progress
from moec.report import Report
from moec.writing import check_writable, write_text

HELP = "latency before and after, per layer and end to end"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--tokens",
        type=counts,
        default=(1, 8, 64, 512),
        metavar="T,T,...",
        help="numbers of tokens; default 1,8,64,512",
    )
    parser.add_argument("--pack", action="store_true", help="keep a second, faster copy of the weights")
    parser.add_argument("--quantize", choices=["int8"], help="weight-only int8; changes results")
    parser.add_argument("--passes", help="passes to run instead of the default ones, as for moec opt")
    parser.add_argument("--backend", default="auto", help="auto, triton, onnxruntime or reference; default auto")
    parser.add_argument("--threads", type=positive, metavar="N", help="threads of torch; default: as torch chooses")
    parser.add_argument("--seconds", type=seconds, default=1.0, metavar="S", help="time for each pair; default 1.0")
    parser.add_argument("--every-layer", action="store_true", help="also time layers that run the same program")
    parser.add_argument("--strict", action="store_true", help="a layer left alone is an error")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots, readable without a network")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the JSON to FILE as well")


def run(arguments: argparse.Namespace) -> int:
    for path in (arguments.html, arguments.output):
        if path is not None:
            check_writable(path)
    import torch

    from moec import bench
    from moec.benchinputs import guess_inputs

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    loaded = load(arguments)
    compiled = _compile(loaded, arguments)
    report: Report = compiled.moec.report
    if not report.layers:
        raise nothing_found(loaded)
    if not report.compiled:
        print(report, file=sys.stderr)
        raise MoecError(
            "MOEC606",
            f"{loaded.source}: no layer was compiled, so there is no after to measure",
            hint=f"moec inspect {arguments.model} --why {report.layers[0].name or '...'}",
        )
    timer = bench.Bench(
        before=loaded.model,
        after=compiled,
        report=report,
        make_inputs=loaded.make_inputs or guess_inputs(loaded.model, report),
        effort=bench.Effort(seconds=arguments.seconds),
        every_layer=arguments.every_layer,
    )
    with progress("bench", timer.steps(arguments.tokens)) as timer.progress:
        result = timer.run(arguments.tokens)
    result.fill(report)
    result.settings = {"source": loaded.source, **result.settings, **_asked(arguments)}
    if arguments.output is not None:
        write_text(arguments.output, result.to_json() + "\n")
    if arguments.html is not None:
        from moec.benchpage import page

        write_text(arguments.html, page(result, report))
    if arguments.json:
        print(result.to_json())
    else:
        print(report.summary(), result, sep="\n\n")
        print(*(f"wrote {path}" for path in (arguments.output, arguments.html) if path is not None), sep="\n")
    return 0


def _compile(loaded: Loaded, arguments: argparse.Namespace) -> Any:
    from moec import api

    return api.compile(
        loaded.model,
        example_inputs=loaded.make_inputs(16) if loaded.make_inputs else None,
        backend=arguments.backend,
        quantize=arguments.quantize,
        passes=arguments.passes,
        pack=arguments.pack,
        strict=arguments.strict,
    )


def _asked(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of compilation that differ from their defaults."""
    asked = {"pack": arguments.pack, "quantize": arguments.quantize, "passes": arguments.passes}
    return {name: value for name, value in asked.items() if value}
