"""The runner of passes: checks the region before and after each, times it, and keeps its log and its diff."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

from moec.errors import MoecError
from moec.ir import Region, diff, verify
from moec.passbase import Option, Pass, PassLog, before_of, options_of, summary
from moec.passtext import print_pass, read_passes

__all__ = ["PassInfo", "default_passes", "known_passes", "list_passes", "parse_passes", "print_passes", "run"]

PassesGiven = str | Iterable[str | Pass]
"""Text, pass objects, or a mixture; a str item may name several passes."""


class PassOptions(Protocol):
    """What default_passes reads of moec.Options."""

    @property
    def passes(self) -> str | tuple[Any, ...] | None: ...
    @property
    def quantize(self) -> str | None: ...
    @property
    def pack(self) -> bool: ...


@dataclass(frozen=True)
class PassInfo:
    """One row of `moec passes`."""

    name: str
    summary: str
    changes_numerics: bool
    options: tuple[Option, ...]
    before: tuple[str, ...] = ()


def known_passes() -> Mapping[str, type[Any]]:
    """moec's own passes by name, in the order in which they run best."""
    # Imported by name and late: the pipeline stands below the passes and must not depend on them.
    return {kind.name: kind for kind in import_module("moec.passes").PASSES}


def list_passes() -> tuple[PassInfo, ...]:
    """Everything `moec passes` prints."""
    return tuple(
        PassInfo(name, summary(kind), kind.changes_numerics, options_of(kind), before_of(kind))
        for name, kind in known_passes().items()
    )


def parse_passes(given: PassesGiven) -> tuple[Pass, ...]:
    """Pass objects for text like "fuse-experts,plan-capacity{factor=1.25}"; objects pass through. See passtext."""
    items = [given] if isinstance(given, str) else list(given)
    passes: list[Pass] = []
    for item in items:
        if isinstance(item, str):
            passes += read_passes(item, known_passes())
        else:
            passes.append(_checked(item))
    return tuple(passes)


def print_passes(passes: Sequence[Pass]) -> str:
    """The text that parse_passes reads back into equal passes."""
    return ",".join(print_pass(one) for one in passes)


def default_passes(options: PassOptions) -> tuple[Pass, ...]:
    """The passes moec.compile runs: the user's list or moec's own, and quantize-experts where int8 is asked for."""
    known = known_passes()
    quantize = ["quantize-experts"] if options.quantize == "int8" else []
    if options.passes is not None:
        passes = parse_passes(options.passes)
        asked = {one.name for one in passes}
        return (*passes, *(known[name]() for name in quantize if name not in asked))
    # Merging copies both weights, and a second copy of weights is the user's choice.
    merge = ["merge-gate-up"] if options.pack else []
    return tuple(known[name]() for name in ["canonicalize", *quantize, *merge, "fuse-experts"])


def run(region: Region, passes: PassesGiven) -> tuple[Region, tuple[PassLog, ...]]:
    """The region after all passes, and one log per pass.

    The region is verified before the first pass and after each. MoecError: MOEC306 when a pass breaks the region, 307
    when it raises, 308 when the order of the passes is wrong, 309 when one of them is no pass.
    """
    listed = parse_passes(passes)
    check_order(listed)
    verify(region)
    logs = []
    for one in listed:
        log = PassLog(one.name)
        region = _step(region, one, log)
        logs.append(log)
    return region, tuple(logs)


def check_order(passes: Sequence[Pass]) -> None:
    """MoecError (MOEC308) if a pass stands behind one that it must run before."""
    for index, late in enumerate(passes):
        for early in passes[:index]:
            if early.name in before_of(late):
                raise MoecError(
                    "MOEC308",
                    f"{late.name} must run before {early.name}",
                    where=print_passes(passes),
                    hint=f'write "{print_pass(late)},{print_pass(early)}"',
                )


def _step(region: Region, one: Pass, log: PassLog) -> Region:
    start = time.perf_counter()
    try:
        after = one(region, log)
    except MoecError as error:
        if error.code.startswith("MOEC1"):  # the pass made something that is no IR
            raise _broken("MOEC306", _broke(region, one, error), error.where) from error
        raise MoecError(error.code, f"{one.name}: {error.message}", where=error.where, hint=error.hint) from error
    except Exception as error:
        raise _broken("MOEC307", f"{one.name} raised {type(error).__name__}: {error}") from error
    _check_result(region, after, one)
    log.seconds = time.perf_counter() - start
    log.diff = "" if after == region else diff(region, after)
    return after


def _check_result(before: Region, after: Region, one: Pass) -> None:
    if not isinstance(after, Region):
        raise _broken("MOEC306", f"{one.name} returned a {type(after).__name__}, not a Region")
    try:
        verify(after)
    except MoecError as error:
        raise _broken("MOEC306", _broke(before, one, error), error.where) from error
    for what, was, now in (
        ("inputs", [str(v.type) for v in before.inputs], [str(v.type) for v in after.inputs]),
        ("outputs", [str(v.type) for v in before.outputs], [str(v.type) for v in after.outputs]),
    ):
        if was != now:
            raise _broken(
                "MOEC306", f"{one.name} changed the region's {what} from {', '.join(was)} to {', '.join(now)}"
            )


def _broke(region: Region, one: Pass, error: MoecError) -> str:
    return f"{one.name} broke the region {region.name}: [{error.code}] {error.message}"


def _broken(code: str, message: str, where: str | None = None) -> MoecError:
    return MoecError(code, message, where=where, hint="this is a defect of the pass; run without it to go on")


def _checked(item: object) -> Pass:
    if isinstance(item, type) or not isinstance(item, Pass):
        shown = f"the class {item.__name__}" if isinstance(item, type) else repr(item)
        raise MoecError(
            "MOEC309",
            f"{shown} is not a pass",
            hint="give an object with name, changes_numerics and __call__(region, log); docs/passes.md shows one",
        )
    return item
