"""Where the demo is shown: colours, rules and boxes by rich on a terminal that has them, plain text elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from moec.table import table

if TYPE_CHECKING:
    from rich.console import Console


class Screen(Protocol):
    def title(self, text: str) -> None: ...

    def say(self, text: str) -> None: ...

    def good(self, text: str) -> None: ...

    def bad(self, text: str) -> None: ...

    def code(self, text: str) -> None:
        """IR text, never wrapped."""

    def diff(self, text: str) -> None:
        """Lines that begin with + or -, and those around them."""

    def rows(self, headers: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None: ...


def open_screen() -> Screen:
    """Rich's screen if rich is installed and stdout is a terminal."""
    if sys.stdout.isatty():
        try:
            from rich.console import Console
        except ImportError:
            return Plain()
        return Rich(Console(highlight=False))
    return Plain()


def shades() -> str:
    """Five characters from light to dark that stdout can print."""
    blocks = " ░▒▓█"
    try:
        blocks.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return " .:*#"
    return blocks


class Plain:
    """Text as it goes into a log file."""

    def title(self, text: str) -> None:
        print(f"\n{text}\n{'-' * len(text)}")

    def say(self, text: str) -> None:
        print(text, flush=True)

    def good(self, text: str) -> None:
        self.say(text)

    def bad(self, text: str) -> None:
        self.say(text)

    def code(self, text: str) -> None:
        self.say(_indent(text))

    def diff(self, text: str) -> None:
        self.say(_indent(text))

    def rows(self, headers: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
        self.say(_indent(table(headers, rows, right=right)))


class Rich:
    """The same on a terminal with colours."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def title(self, text: str) -> None:
        from rich.text import Text

        self.console.print()
        self.console.rule(Text(text, style="bold cyan"), style="cyan", align="left")

    def say(self, text: str) -> None:
        self._print(text, "")

    def good(self, text: str) -> None:
        self._print(text, "bold green")

    def bad(self, text: str) -> None:
        self._print(text, "bold red")

    def code(self, text: str) -> None:
        from rich.text import Text

        shown = Text(_indent(text))
        shown.highlight_regex(r"%[\w.]+", "cyan")
        shown.highlight_regex(r"(?<== )[a-z_]+(?=[ (])", "bold")
        shown.highlight_regex(r"\b(f64|f32|f16|bf16|i8|i32|i64|bool)\[[^\]]*\]", "green")
        shown.highlight_regex(r"\{[^}\n]+\}", "yellow")
        self.console.print(shown, soft_wrap=True)

    def diff(self, text: str) -> None:
        styles = {"+": "green", "-": "red"}
        for line in text.splitlines():
            self._print(f"  {line}", styles.get(line[:1], "dim"))

    def rows(self, headers: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        shown = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold", border_style="dim")
        for header in headers:
            shown.add_column(header, no_wrap=True, justify="right" if header in right else "left")
        for row in rows:
            shown.add_row(*(Text(cell) for cell in row))
        self.console.print(shown)

    def _print(self, text: str, style: str) -> None:
        # As Text, because IR and type names have the square brackets that rich's markup would eat.
        from rich.text import Text

        self.console.print(Text(text, style=style), soft_wrap=True)


def _indent(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in text.splitlines())
