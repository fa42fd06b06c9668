"""Passes as text: "plan-capacity{factor=1.5,scope=sequence},fuse-experts" to pass objects and back.

passes := pass ("," pass)*
pass   := NAME | NAME "{" [option ("," option)*] "}"        NAME is a pass's, or "module:Class" for one's own
option := NAME "=" value
value  := WORD | STRING | "[" [value ("," value)*] "]"
"""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Never

from moec.errors import MoecError
from moec.options import suggest
from moec.passbase import Pass, accepts, option_values, options_of, wrong_value

_TOKEN = re.compile(r'\s*(?:(?P<word>[\w.:+/-]+)|(?P<string>"(?:[^"\\]|\\.)*")|(?P<mark>[{}\[\],=])|(?P<bad>\S)|$)')
_BARE = re.compile(r"[A-Za-z_][\w.:/-]*")
_WORDS = {"true": True, "false": False, "none": None}


def print_pass(given: Pass) -> str:
    """The pass as text, with the options that differ from their defaults."""
    options = ",".join(f"{name}={_print_value(value)}" for name, value in option_values(given).items())
    return given.name + (f"{{{options}}}" if options else "")


def read_passes(text: str, known: Mapping[str, type[Any]]) -> tuple[Pass, ...]:
    """Pass objects for the text. MoecError: MOEC301 (name), 302 to 304 (options), 305 (syntax), with the column."""
    return _Reader(text, known).passes()


def _print_value(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ",".join(_print_value(item) for item in value) + "]"
    if isinstance(value, str):
        return value if _BARE.fullmatch(value) and value not in _WORDS else json.dumps(value)
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


@dataclass(frozen=True)
class _Token:
    kind: str
    """"word", "string", "mark", or "end"."""
    text: str
    column: int

    def __str__(self) -> str:
        return "the end" if self.kind == "end" else f'"{self.text}"' if self.kind != "string" else self.text


class _Reader:
    def __init__(self, text: str, known: Mapping[str, type[Any]]) -> None:
        self.text = text
        self.known = known
        self.tokens = self._split()
        self.at = 0

    def _split(self) -> list[_Token]:
        found, position = [], 0
        while match := _TOKEN.match(self.text, position):
            kind = match.lastgroup
            if kind is None:
                break
            token = _Token(kind, match[kind], match.start(kind) + 1)
            if kind == "bad":
                self._fail("MOEC305", f"character {token.text!r} has no place here", token)
            found.append(token)
            position = match.end()
        return [*found, _Token("end", "", len(self.text) + 1)]

    def passes(self) -> tuple[Pass, ...]:
        if self._next().kind == "end":
            return ()
        read = [self._pass()]
        while self._next().kind != "end":
            self._take(",", 'a "," or the end')
            read.append(self._pass())
        return tuple(read)

    def _pass(self) -> Pass:
        token = self._word("the name of a pass")
        kind = self._class(token)
        given: dict[str, Any] = {}
        if self._next().text == "{":
            self._take("{", '"{"')
            while self._next().text != "}":
                self._option(token.text, kind, given)
                if self._next().text != "}":
                    self._take(",", '"," or "}"')
            self._take("}", '"}"')
        missing = [option.name for option in options_of(kind) if option.required and option.name not in given]
        if missing:
            self._fail("MOEC302", f"{token.text}: {missing[0]} must be given", token)
        try:
            return typing.cast(Pass, kind(**given))
        except MoecError as error:
            raise MoecError(
                error.code, error.message, where=error.where or self._where(token), hint=error.hint
            ) from None

    def _class(self, token: _Token) -> type[Any]:
        if ":" in token.text:
            return self._own_class(token)
        if token.text not in self.known:
            self._fail("MOEC301", f'no pass is named "{token.text}"', token, suggest(token.text, self.known))
        return self.known[token.text]

    def _own_class(self, token: _Token) -> type[Any]:
        module, _, name = token.text.partition(":")
        try:
            kind = getattr(import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            self._fail("MOEC301", f'"{token.text}" cannot be imported: {error}', token)
        if not isinstance(kind, type):
            self._fail("MOEC309", f'"{token.text}" is not a pass: it is not a class', token)
        return kind

    def _option(self, name: str, kind: type[Any], given: dict[str, Any]) -> None:
        token = self._word("the name of an option")
        options = {option.name: option for option in options_of(kind)}
        if token.text not in options:
            hint = suggest(token.text, options) if options else f"{name} has no options"
            self._fail("MOEC302", f'{name} has no option "{token.text}"', token, hint)
        if token.text in given:
            self._fail("MOEC302", f"{name}: {token.text} is given twice", token)
        self._take("=", '"="')
        start = self._next()
        value = self._value(options[token.text].type)
        if not accepts(options[token.text].type, value):
            raise wrong_value(name, options[token.text], self._since(start), self._where(start))
        given[token.text] = value

    def _value(self, kind: Any) -> Any:
        token = self._next()
        if token.text == "[" and token.kind == "mark":
            self._take("[", '"["')
            items = []
            while self._next().text != "]":
                items.append(self._value(_item_type(kind)))
                if self._next().text != "]":
                    self._take(",", '"," or "]"')
            self._take("]", '"]"')
            return tuple(items)
        if token.kind not in ("word", "string"):
            self._fail("MOEC305", f"{token} stands where a value is expected", token)
        self.at += 1
        return self._unquoted(token) if token.kind == "string" else _word_value(token.text, kind)

    def _unquoted(self, token: _Token) -> str:
        try:
            return str(json.loads(token.text))
        except json.JSONDecodeError as error:
            self._fail("MOEC305", f"{token} is not a string: {error.msg}", token)

    def _since(self, start: _Token) -> str:
        last = self.tokens[self.at - 1]
        return self.text[start.column - 1 : last.column - 1 + len(last.text)]

    def _next(self) -> _Token:
        return self.tokens[self.at]

    def _word(self, expected: str) -> _Token:
        token = self._next()
        if token.kind != "word":
            self._fail("MOEC305", f"{token} stands where {expected} is expected", token)
        self.at += 1
        return token

    def _take(self, text: str, expected: str) -> None:
        token = self._next()
        if token.kind != "mark" or token.text != text:
            self._fail("MOEC305", f"{token} stands where {expected} is expected", token)
        self.at += 1

    def _fail(self, code: str, message: str, token: _Token, hint: str | None = None) -> Never:
        raise MoecError(code, message, where=self._where(token), hint=hint)

    def _where(self, token: _Token) -> str:
        return f"column {token.column} of: {self.text}"


def _item_type(kind: Any) -> Any:
    """The T of tuple[T, ...], also inside a union; anything else takes no list and is refused after reading."""
    members = typing.get_args(kind) if typing.get_origin(kind) is not tuple else (kind,)
    return next((typing.get_args(m)[0] for m in members if typing.get_origin(m) is tuple), kind)


def _word_value(word: str, kind: Any) -> Any:
    """The word read as the first thing it can be that the type takes, else the word itself."""
    readings: list[Any] = []
    if word.lower() in _WORDS:
        readings.append(_WORDS[word.lower()])
    for number in (int, float):
        try:
            readings.append(number(word))
        except ValueError:
            continue
    return next((value for value in readings if accepts(kind, value)), word)
