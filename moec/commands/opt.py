"""Run passes over IR text: a region or a program in, the same out, or what the passes changed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moec import pipeline
from moec.errors import MoecError
from moec.ir import text
from moec.jsontext import dumps
from moec.writing import check_writable, write_text

HELP = "run passes over IR text"


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
    before = text.parse(_read(arguments.file))
    after, logs = pipeline.run(before, passes)
    if arguments.output is not None:
        write_text(arguments.output, f"{after}\n")
    if arguments.json:
        rows = [{"name": log.name, "done": log.done, "skipped": log.skipped, "diff": log.diff} for log in logs]
        print(dumps({"ir": str(after), "passes": rows}))
        return 0
    if arguments.verbose:
        for log in logs:
            for line in (*log.done, *(f"left alone: {reason}" for reason in log.skipped)):
                print(f"{log.name}: {line}", file=sys.stderr)
    if arguments.diff:
        for log in logs:
            print(f"--- {log.name}\n{log.diff}" if log.diff else f"--- {log.name}: no change")
    elif arguments.output is None:
        print(after)
    return 0


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
