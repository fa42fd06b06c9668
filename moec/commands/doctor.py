"""Run known defects of the installed ONNX Runtime, and say what is safe to use.

Each case runs one of ONNX Runtime's own MoE ops on a small layer whose result is known. Files that moec writes with
--target portable use none of these ops.
"""

from __future__ import annotations

import argparse

from moec.jsontext import dumps
from moec.table import table

HELP = "run known runtime defects against what is installed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It takes no arguments of its own."""


def run(arguments: argparse.Namespace) -> int:
    import onnxruntime

    from moec.backends.onnx.defects import examine
    from moec.environment import warnings

    findings = examine()
    wrong = [one for one in findings if one.status == "wrong"]
    providers = onnxruntime.get_available_providers()
    if arguments.json:
        found = [vars(one) for one in findings]
        about = {"onnxruntime": onnxruntime.__version__, "providers": providers, "warnings": warnings()}
        print(dumps({**about, "examined": "CPUExecutionProvider", "findings": found}))
        return 0
    print(f"onnxruntime {onnxruntime.__version__}, {', '.join(providers)}; examined: CPUExecutionProvider\n")
    rows = [[one.name, one.op, one.asks, one.status, one.found] for one in findings]
    print(table(["case", "op", "asks for", "is", "found"], rows))
    print()
    for one in wrong:
        print(f"{one.name}: {one.op} with {one.asks}: {one.advice}")
    print("--target portable uses ONNX's own ops alone, and none of these")
    for line in warnings():
        print(f"warning: {line}")
    return 0
