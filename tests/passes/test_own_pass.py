"""The pass that docs/passes.md shows, run as a reader would."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moec.errors import MoecError
from moec.ir import Region
from moec.passbase import options_of
from moec.passes import PASSES
from moec.pipeline import parse_passes, run
from tests.passes.layers import mixtral_layer

PAGE = (Path(__file__).parents[2] / "docs" / "passes.md").read_text(encoding="utf-8")


def layer(limit: float) -> Region:
    return mixtral_layer("moe", e=4, k=2, d=8, f=16, limit=limit)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example as a module called my_module."""
    block = re.search(r"test_own_pass\.py\. -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    assert block is not None
    module = ModuleType("my_module")
    monkeypatch.setitem(sys.modules, "my_module", module)
    exec(compile(block[1], "docs/passes.md", "exec", dont_inherit=True), module.__dict__)
    return module.RemoveClamps


def test_it_runs_as_an_object(own: Any) -> None:
    after, (log,) = run(layer(60.0), [own()])
    assert log.done == ["%a: it has no limit of 60.0 any more"]
    assert "limit" not in str(after)


def test_it_says_what_it_left_alone(own: Any) -> None:
    after, (log,) = run(layer(7.0), [own()])
    assert log.skipped == ["%a: its limit 7.0 is below 50.0"]
    assert after == layer(7.0)


def test_it_runs_by_name(own: Any) -> None:
    assert parse_passes("my_module:RemoveClamps{above=40}") == (own(above=40),)


def test_its_options_are_checked(own: Any) -> None:
    for given, code in ((-1.0, "MOEC304"), ("much", "MOEC303")):
        with pytest.raises(MoecError) as error:
            own(above=given)
        assert error.value.code == code


def test_the_page_has_a_section_for_every_pass() -> None:
    for kind in PASSES:
        assert f"\n## {kind.name}\n" in PAGE


def test_the_page_lists_the_options_of_every_pass() -> None:
    for kind in PASSES:
        section = PAGE.split(f"\n## {kind.name}\n")[1].split("\n## ")[0]
        listed = re.findall(r"^\| (\w+) \| [^|]+ \| [^|]+ \| ", section, re.MULTILINE)
        assert [name for name in listed if name != "option"] == [option.name for option in options_of(kind)]
