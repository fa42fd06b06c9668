"""Run known defects of the installed ONNX Runtime, and say what is safe to use.

Each case runs one of ONNX Runtime's own MoE ops on a small layer whose result is known: on the CPU provider, and on the
CUDA provider where it loads. Files that moec writes with --target portable use none of these ops.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from moec.jsontext import dumps
from moec.table import table

if TYPE_CHECKING:
    from moec.backends.onnx.defects import Finding

HELP = "run known runtime defects against what is installed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It takes no arguments of its own."""


def run(arguments: argparse.Namespace) -> int:
    import onnxruntime

    from moec.backends.onnx.defects import RESTS_ON, examine
    from moec.backends.onnx.providers import CPU, CUDA, check_installed, why_no_cuda
    from moec.environment import warnings

    check_installed()
    findings = examine()
    rests: dict[str, Sequence[str]] = dict(RESTS_ON)
    why = why_no_cuda()
    examined = [CPU]
    if not why:
        from moec.backends.onnx import defects_cuda

        findings += defects_cuda.examine_cuda()
        rests |= defects_cuda.RESTS_ON
        examined.append(CUDA)
    safe = {name: _verdict(findings, cases) for name, cases in rests.items()}
    providers = onnxruntime.get_available_providers()
    if arguments.json:
        about = {"onnxruntime": onnxruntime.__version__, "providers": providers, "warnings": warnings()}
        about |= {"examined": examined, "not_examined": {CUDA: why} if why else {}, "safe": safe}
        print(dumps({**about, "findings": [vars(one) for one in findings]}))
        return 0
    print(f"onnxruntime {onnxruntime.__version__}, {', '.join(providers)}; examined: {', '.join(examined)}\n")
    rows = [[one.name, one.op, one.asks, one.status, one.found] for one in findings]
    print(table(["case", "op", "asks for", "is", "found"], rows))
    print()
    _advise(findings, safe, why)
    for line in warnings():
        print(f"warning: {line}")
    return 0


def _verdict(findings: Sequence[Finding], cases: Sequence[str]) -> str:
    """ "safe", or the cases that are not right."""
    status = {one.name: one.status for one in findings}
    bad = [name for name in cases if status.get(name) != "right"]
    return f"not safe: {', '.join(bad)}" if bad else "safe"


def _advise(findings: Sequence[Finding], safe: Mapping[str, str], why: str) -> None:
    for one in findings:
        if one.status == "wrong":
            print(f"{one.name}: {one.op} with {one.asks}: {one.advice}")
    print("--target portable: safe: uses ONNX's own ops alone, and none of these")
    for name, verdict in safe.items():
        print(f"{name}: {verdict}")
    if why:
        print(f"--target cuda: not examined: {why}")
