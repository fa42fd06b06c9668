"""docs/frontend.md: its program runs, prints what the page says, and names activations and guards there are."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from moec.frontends.torch.activation import FUNCTIONS

PAGE = (Path(__file__).parents[2] / "docs" / "frontend.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return [text for of, text in found if of == language]


def test_the_program_of_the_page_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    # Classes can be pickled only where a module has them.
    page = ModuleType("page_on_the_front_end")
    monkeypatch.setitem(sys.modules, page.__name__, page)
    for number, block in enumerate(blocks("python"), 1):
        exec(compile(block, f"docs/frontend.md, block {number}", "exec", dont_inherit=True), page.__dict__)
    shown = capsys.readouterr().out
    expected = blocks("")
    assert len(expected) == 5
    for text in expected:
        assert text in shown
    for cut in ("submodule", "slice", "ffn"):
        assert f"compiled, cut: {cut}\n" in shown
    assert "was pickled" in shown


def test_the_activations_are_those_there_are() -> None:
    (listed,) = re.findall(r"Activations that have a name: (.*?), and `x \* sigmoid", PAGE)
    assert listed.split(", ") == list(FUNCTIONS)


def test_reasons_named_are_in_the_front_end() -> None:
    """The last column of the tables of refusals quotes the code."""
    source = "\n".join(
        path.read_text(encoding="utf-8") for path in (Path(__file__).parents[2] / "moec/frontends/torch").glob("*.py")
    )
    tables = PAGE.split("## What is left alone today")[1].split("## Writing a module")[0]
    quoted = [
        text.strip(". ")
        for row in re.findall(r"^\|.*\|(.*)\|$", tables, re.MULTILINE)
        for text in re.findall(r"`([^`]+)`", row)
    ]
    assert len(quoted) > 15
    for text in quoted:
        words = text.replace("weight 'name' is", "is on the meta device")
        assert words in source, text
