"""Golden files: the text a test must produce. `pytest --update-golden` writes it anew and prints what changed."""

from __future__ import annotations

import difflib
from pathlib import Path

import pytest

from moec.ir import Region
from moec.passbase import PassLog
from moec.pipeline import run

FOLDER = Path(__file__).parent / "golden"


def check_golden(name: str, text: str, *, update: bool) -> None:
    """Compare the text with golden/NAME.txt; with `update` write it instead, and show what changed."""
    file = FOLDER / f"{name}.txt"
    known = file.read_text(encoding="utf-8") if file.exists() else ""
    if known == text:
        return
    lines = difflib.unified_diff(known.splitlines(), text.splitlines(), str(file.name), "now", lineterm="")
    shown = "\n".join(lines)
    if update:
        FOLDER.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
        print(f"wrote {file.name}\n{shown}")
        return
    pytest.fail(f"{shown}\nIf the new text is right, run: pytest tests/passes --update-golden", pytrace=False)


def golden_text(before: Region, passes: str) -> str:
    """The region before, and after each pass what it said and the region after all of them."""
    after, logs = run(before, passes)
    return "\n".join([f"before\n{before}\n", *(_told(log) for log in logs), f"after\n{after}\n"])


def _told(log: PassLog) -> str:
    lines = [log.name, *(f"  did {text}" for text in log.done), *(f"  left {text}" for text in log.skipped)]
    return "\n".join([*lines, *(f"  {name} = {number:,}" for name, number in log.numbers.items())]) + "\n"
