"""Tokens with positions, for the text of regions and of sizes."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

from moec.errors import MoecError, did_you_mean

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r]+|\#[^\n]*)
      | (?P<newline>\n)
      | (?P<value>%[A-Za-z0-9_][A-Za-z0-9_.]*)
      | (?P<name>[A-Za-z_][A-Za-z0-9_.]*)
      | (?P<number>[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?)
      | (?P<string>"([^"\\\n]|\\.)*")
      | (?P<verbatim>\|[^\n]*)
      | (?P<mark>->|[(){}\[\],:=+\-*/])""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Token:
    """A piece of text; `kind` is value, name, number, string, verbatim, mark, newline or end.

    Lines and columns count from 1.
    """

    kind: str
    text: str
    line: int
    column: int

    def __str__(self) -> str:
        return {"newline": "end of line", "end": "end of text"}.get(self.kind, f"'{self.text}'")


class Cursor:
    """Reads tokens one after the other and words the errors. `what` says what the text is in an error without lines."""

    def __init__(self, text: str, *, code: str) -> None:
        self.lines = text.split("\n")
        self.code = code
        self.tokens = self._tokens(text)
        self.index = 0

    def _tokens(self, text: str) -> list[Token]:
        tokens, position, line, start = [], 0, 1, 0
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                self.fail(
                    f"unexpected character {text[position]!r}",
                    Token("mark", text[position], line, position - start + 1),
                )
            kind = match.lastgroup or ""
            if kind != "space":
                tokens.append(Token(kind, match.group(), line, position - start + 1))
            position = match.end()
            if kind == "newline":
                line, start = line + 1, position
        tokens.append(Token("end", "", line, position - start + 1))
        return tokens

    @property
    def token(self) -> Token:
        """The next token, not yet taken."""
        return self.tokens[self.index]

    def take(self) -> Token:
        """Take the next token; the end of the text stays."""
        token = self.token
        if token.kind != "end":
            self.index += 1
        return token

    def at(self, *marks: str) -> bool:
        """Whether the next token is one of these marks."""
        return self.token.kind == "mark" and self.token.text in marks

    def accept(self, mark: str) -> bool:
        """Take the mark if it comes next."""
        if not self.at(mark):
            return False
        self.take()
        return True

    def expect(self, mark: str, after: str) -> Token:
        """Take the mark or raise a syntax error that says after what it was expected."""
        if not self.at(mark):
            self.fail(f"expected '{mark}' after {after}, found {self.token}")
        return self.take()

    def expect_kind(self, kind: str, what: str) -> Token:
        """Take a token of this kind or raise a syntax error that says what was expected."""
        if self.token.kind != kind:
            self.fail(f"expected {what}, found {self.token}")
        return self.take()

    def expect_line_end(self, after: str) -> None:
        """Take the end of the line, and empty lines behind it."""
        if self.token.kind not in ("newline", "end"):
            self.fail(f"expected the end of the line after {after}, found {self.token}")
        self.skip_newlines()

    def separated(self) -> Iterator[None]:
        """Once, and once more after each comma: `for _ in cursor.separated()` reads the items of a list."""
        yield
        while self.accept(","):
            yield

    @contextmanager
    def at_line(self, token: Token) -> Iterator[None]:
        """Give errors raised inside the line of this token as their place."""
        try:
            yield
        except MoecError as error:
            raise error.located(f"line {token.line}: {self.lines[token.line - 1].strip()}") from None

    @contextmanager
    def at_token(self, token: Token) -> Iterator[None]:
        """Give errors raised inside this token as their place."""
        try:
            yield
        except MoecError as error:
            raise error.located(self.where(token)) from None

    def skip_newlines(self) -> None:
        """Take empty lines."""
        while self.token.kind == "newline":
            self.take()

    def where(self, token: Token) -> str:
        """Line, column, the line itself and a caret under the token."""
        line = self.lines[token.line - 1]
        text = line.strip()
        lead = f"line {token.line}, column {token.column}: "
        offset = token.column - 1 - (len(line) - len(line.lstrip()))
        width = max(1, min(len(token.text.strip("\n")), len(text) - offset))
        # The error prints "  at " before the place.
        return f"{lead}{text}\n{' ' * (len('  at ') + len(lead) + max(offset, 0))}{'^' * width}"

    def fail(
        self, message: str, token: Token | None = None, *, code: str | None = None, known: Iterable[str] = ()
    ) -> NoReturn:
        """Raise MoecError at `token` (the next one by default); `known` names are tried for "did you mean"."""
        place = token or self.token
        hint = did_you_mean(place.text, known)
        raise MoecError(code or self.code, message, where=self.where(place), hint=hint)
