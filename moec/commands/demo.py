"""Compile a really trained small MoE on this machine, and show the IR, the check, the accuracy and the latencies.

The model, a classifier of handwritten digits, and its held-out digits come with moec; nothing is downloaded.
"""

from __future__ import annotations

import argparse

from moec.commands.arguments import counts, positive, seconds

HELP = "compile a trained small MoE here and show everything"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batches",
        type=counts,
        default=(1, 8, 64, 256),
        metavar="B,B,...",
        help="numbers of images to time; default 1,8,64,256",
    )
    parser.add_argument("--pack", action="store_true", help="keep a second, faster copy of the weights")
    parser.add_argument("--quantize", choices=["int8"], help="compile a second time with int8 weights")
    parser.add_argument("--threads", type=positive, metavar="N", help="threads of torch; default: as torch chooses")
    parser.add_argument("--seconds", type=seconds, default=1.0, metavar="S", help="time for each pair; default 1.0")


def run(arguments: argparse.Namespace) -> int:
    from moec.demo.run import run as run_demo

    return run_demo(
        batch_sizes=arguments.batches,
        pack=arguments.pack,
        quantize=arguments.quantize,
        threads=arguments.threads,
        json=arguments.json,
        seconds=arguments.seconds,
    )
