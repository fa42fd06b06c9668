"""Errors: their text, and that codes and docs/errors.md say the same."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest

from moec.errors import CODES, MoecError, count, did_you_mean

ROOT = Path(__file__).parent.parent
DOCS = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")


def test_text() -> None:
    error = MoecError("MOEC102", "route: k=9 must be in 1..8", where="line 4: %w, %e = route(%l) {k=9}", hint="lower k")
    assert str(error) == (
        "[MOEC102] route: k=9 must be in 1..8\n  at line 4: %w, %e = route(%l) {k=9}\n  hint: lower k"
    )
    assert str(MoecError("MOEC102", "k")) == "[MOEC102] k"
    assert (error.code, error.hint) == ("MOEC102", "lower k")


def test_a_place_is_added_once() -> None:
    inner = MoecError("MOEC102", "k", where="line 4", hint="lower k")
    assert inner.located("line 9") is inner
    outer = MoecError("MOEC102", "k", hint="lower k").located("line 9")
    assert str(outer) == "[MOEC102] k\n  at line 9\n  hint: lower k"


def test_pickle_keeps_everything() -> None:
    error = pickle.loads(pickle.dumps(MoecError("MOEC102", "k", where="line 4", hint="lower k")))
    assert str(error) == "[MOEC102] k\n  at line 4\n  hint: lower k"


def test_an_unknown_code_is_our_own_bug() -> None:
    with pytest.raises(AssertionError, match=r"MOEC999 is not in moec\.errors\.CODES"):
        MoecError("MOEC999", "?")


def test_did_you_mean() -> None:
    assert did_you_mean("gathr", ["gather", "group"]) == 'did you mean "gather"?'
    assert did_you_mean("zzz", ["gather"]) is None


def test_count() -> None:
    assert [count(number, "size") for number in (0, 1, 2)] == ["0 sizes", "1 size", "2 sizes"]


def test_codes_are_sorted_and_well_formed() -> None:
    assert list(CODES) == sorted(CODES)
    assert all(re.fullmatch(r"MOEC[1-7]\d\d", code) for code in CODES)
    assert all(title and title[-1] != "." for title in CODES.values())


def test_every_code_is_documented_and_every_documented_code_exists() -> None:
    assert re.findall(r"^## (MOEC\d+)$", DOCS, re.MULTILINE) == list(CODES)


@pytest.mark.parametrize(("code", "title"), CODES.items())
def test_the_section_opens_with_the_title(code: str, title: str) -> None:
    section = DOCS.split(f"## {code}\n", 1)[1].split("\n## ", 1)[0].strip()
    assert section.startswith(f"**{title}.**")
    assert len(section.split()) > len(title.split()) + 5


def test_every_code_is_raised_somewhere() -> None:
    folders = ("moec", "passes", "backends")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py") if not file.is_symlink()]
    source = "\n".join(file.read_text(encoding="utf-8") for file in files if file.name != "errors.py")
    assert [code for code in CODES if code not in source] == []
    assert sorted(set(re.findall(r"MOEC\d{3}\b", source)) - set(CODES)) == []
