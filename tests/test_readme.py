"""The README's examples run as they stand, its links lead somewhere, and it names the commands there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moec import cli

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")])


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language; "" for blocks that name none."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [text for name, text in fenced if name == language]


def test_the_python_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    examples = blocks(ROOT / "README.md", "python")
    assert len(examples) == 3
    names: dict[str, object] = {"__name__": "readme"}
    for number, example in enumerate(examples, 1):
        exec(compile(example, f"README.md, example {number}", "exec"), names)
    shown = capsys.readouterr().out
    assert "2 of 2 layers compiled" in shown
    assert "1 of 1 layers compiled" in shown
    assert "left alone" not in shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```|`[^`\n]+`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in link:
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_commands_named_are_the_commands_there_are() -> None:
    (listing,) = (block for block in blocks(ROOT / "README.md", "") if "moec inspect" in block)
    assert set(re.findall(r"moec (\w+)", listing)) == set(cli.COMMANDS)


def test_make_goals_named_exist() -> None:
    goals = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        for code in re.findall(r"```.*?```|`[^`]+`", page.read_text(encoding="utf-8"), re.DOTALL):
            for goal in re.findall(r"\bmake ([a-z-]+)", code):
                assert goal in goals, f"{page.name}: make {goal}"
