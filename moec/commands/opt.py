"""Run passes over IR text: a region or a program in, the same out, or what the passes changed."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moec import pipeline
from moec.errors import MoecError
from moec.ir import Program, Region, parse, parse_program
from moec.jsontext import dumps
from moec.passbase import PassLog
from moec.writing import check_writable, write_text

HELP = "run passes over IR text"

_BLOCK = re.compile(r"^(?:region|graph|host)\b", re.MULTILINE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help='IR text; "-" reads standard input')
    parser.add_argument(
        "--passes", default="", help="names with options, in order: 'canonicalize,plan-capacity{factor=1.25,tokens=64}'"
    )
    parser.add_argument("--diff", action="store_true", help="print what each pass changed instead of the IR")
    parser.add_argument("-o", "--output", type=Path, metavar="OUT", help="write the IR to OUT instead of printing it")
    parser.add_argument("-v", "--verbose", action="store_true", help="say what each pass did and what it left alone")


def run(arguments: argparse.Namespace) -> int:
    passes = pipeline.parse_passes(arguments.passes)
    if arguments.output is not None:
        check_writable(arguments.output)
    before = _parse(arguments.file, _read(arguments.file))
    logs: list[tuple[str, PassLog]] = []

    def optimise(region: Region) -> Region:
        after, own = pipeline.run(region, passes)
        logs.extend((region.name, log) for log in own)
        return after

    after = before.map_regions(optimise) if isinstance(before, Program) else optimise(before)
    if arguments.output is not None:
        write_text(arguments.output, f"{after}\n")
    if arguments.verbose:
        print(*_told(logs), sep="\n", end="\n" if logs else "", file=sys.stderr)
    if arguments.json:
        print(dumps({"ir": str(after), "passes": [_as_dict(region, log) for region, log in logs]}))
    elif arguments.diff:
        for region, log in logs:
            print(f"--- {log.name} on {region}{'' if log.diff else ': no change'}")
            print(log.diff, end="\n" if log.diff else "")
    elif arguments.output is None:
        print(after)
    return 0


def _told(logs: Sequence[tuple[str, PassLog]]) -> list[str]:
    lines = []
    for region, log in logs:
        lines += [f"{region}: {log.name}: {line}" for line in log.done]
        lines += [f"{region}: {log.name}: left alone: {line}" for line in log.skipped]
    return lines


def _as_dict(region: str, log: PassLog) -> dict[str, Any]:
    return {"region": region, "name": log.name, "done": log.done, "skipped": log.skipped, "diff": log.diff}


def _parse(file: str, source: str) -> Region | Program:
    """A lone region may name graphs that are not in the file; several blocks are a program and must be complete."""
    read = parse_program if len(_BLOCK.findall(source)) > 1 else parse
    try:
        return read(source)
    except MoecError as error:
        raise MoecError(error.code, f"{file}: {error.message}", where=error.where, hint=error.hint) from error


def _read(file: str) -> str:
    if file == "-":
        return sys.stdin.read()
    try:
        return Path(file).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise MoecError("MOEC601", f"{file}: no such file", hint='name a file of IR text, or "-"') from error
    except IsADirectoryError as error:
        raise MoecError("MOEC601", f"{file} is a folder", hint="name a file of IR text") from error
    except UnicodeDecodeError as error:
        raise MoecError("MOEC601", f"{file} is not UTF-8 text", hint="moec opt reads IR text") from error
    except OSError as error:
        raise MoecError("MOEC601", f"{file}: {error.strerror}", hint="make the file readable") from error
