"""Says how far long work has come: a rich bar on a terminal, a line now and then elsewhere, nothing on stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID
    from rich.status import Status


class Progress(Protocol):
    def step(self, what: str) -> None:
        """The next unit of work, named what, begins."""


class Silent:
    def step(self, what: str) -> None:
        pass


class Lines:
    """A line on stderr per step, at most one every few seconds, so that a log file stays short."""

    def __init__(self, title: str, total: int | None = None, *, every: float = 5.0) -> None:
        self.title, self.total, self.every = title, total, every
        self.done = 0
        self.last = -every

    def step(self, what: str) -> None:
        self.done += 1
        now = time.monotonic()
        if self.done == 1 or now - self.last >= self.every:
            self.last = now
            count = "" if self.total is None else f" {self.done}/{self.total}"
            print(f"{self.title}{count}: {what}", file=sys.stderr, flush=True)


@contextmanager
def progress(title: str, total: int, *, quiet: bool = False) -> Iterator[Progress]:
    """Progress of total steps; rich where it is installed and stderr is a terminal."""
    if quiet:
        yield Silent()
        return
    bar = _rich_bar() if sys.stderr.isatty() else None
    if bar is None:
        yield Lines(title, total)
        return
    with bar as live:
        yield _Rich(live, live.add_task(title, total=total), title)


@contextmanager
def show_progress(title: str) -> Iterator[Callable[[str], None]]:
    """For a library call whose number of steps is not known: a function to say what is being done.

    Shown on a terminal only: a program that writes its stderr to a file did not ask for our lines.
    """
    if not sys.stderr.isatty():
        yield lambda what: None
        return
    status = _rich_status(title)
    if status is None:
        yield Lines(title).step
        return
    try:
        yield lambda what: status.update(f"{title}: {what}")
    finally:
        status.stop()


def _rich_status(title: str) -> Status | None:
    """A running spinner; None without rich, and inside a display of the caller's own that cannot take another."""
    try:
        from rich.console import Console
        from rich.errors import LiveError
    except ImportError:
        return None
    status = Console(stderr=True).status(title)
    try:
        status.start()
    except LiveError:
        return None
    return status


class _Rich:
    def __init__(self, bar: Bar, task: TaskID, title: str) -> None:
        self.bar, self.task, self.title = bar, task, title
        self.started = False

    def step(self, what: str) -> None:
        # A step counts as done when the next one begins.
        self.bar.update(self.task, advance=int(self.started), description=f"{self.title}: {what}")
        self.started = True


def _rich_bar() -> Bar | None:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress
    except ImportError:
        return None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return RichProgress(*columns, console=Console(stderr=True), transient=True)
