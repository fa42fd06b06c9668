"""The moec command: puts the commands together and turns errors into exit statuses; it imports no torch itself."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Protocol

from moec import __version__
from moec.commands import bench, demo, doctor, env, export, inspect, opt, passes, tune
from moec.errors import MoecError


class Command(Protocol):
    """What a module of moec.commands has. Its docstring is the description in the help."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...
    def run(self, arguments: argparse.Namespace) -> int: ...


COMMANDS: dict[str, Command] = {
    "demo": demo,
    "inspect": inspect,
    "opt": opt,
    "bench": bench,
    "export": export,
    "tune": tune,
    "doctor": doctor,
    "passes": passes,
    "env": env,
}

DONE, USER_ERROR, WRONG_COMMAND_LINE, VERIFICATION_FAILED, NOTHING_MATCHED = range(5)
INTERRUPTED = 130
STATUS = {
    "MOEC221": VERIFICATION_FAILED,
    "MOEC606": NOTHING_MATCHED,
    "MOEC704": VERIFICATION_FAILED,
    "MOEC705": NOTHING_MATCHED,
}
"""Exit statuses of codes that are not plain user errors."""

STATUSES = """exit status: 0 done, 1 user error, 2 wrong command line, 3 verification failed, 4 nothing matched;
after 3 and 4 nothing was written"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moec",
        description="A compiler for Mixture-of-Experts layers.",
        epilog=STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"moec {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        one = commands.add_parser(
            name,
            help=command.HELP,
            description=command.__doc__,
            epilog=STATUSES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(one)
        one.add_argument("--json", action="store_true", help="print JSON instead of text")
        one.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status. argparse itself exits with 2 on a wrong command line."""
    arguments = build_parser().parse_args(argv)
    try:
        status = COMMANDS[arguments.command].run(arguments)
        sys.stdout.flush()  # so that a reader who has left is noticed here and not while Python shuts down
        return status
    except MoecError as error:
        if arguments.debug:
            raise
        print(error, file=sys.stderr)
        return STATUS.get(error.code, USER_ERROR)
    except ModuleNotFoundError as error:
        if arguments.debug or error.name is None or error.name.startswith("moec"):
            raise
        hint = f"pip install {error.name}"
        print(MoecError("MOEC609", f"moec {arguments.command} needs {error.name}", hint=hint), file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone, as in `moec passes | head -1`; say nothing more to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
