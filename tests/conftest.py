"""What all tests share: random numbers that start the same, and hypothesis without a clock."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import settings

# A busy machine is no failure; what hypothesis draws is the same on every run, so that a red test stays red.
settings.register_profile("moec", deadline=None, derandomize=True, database=None)
settings.load_profile("moec")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew and print what changed")


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))


def pytest_configure() -> None:
    """Processes that run tests side by side share the cores instead of each taking them all."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        import torch

        torch.set_num_threads(max(1, torch.get_num_threads() // workers))


# What these tests ask about is made once for each name and kept: tests of one name run in one process.
_KEPT_BY_NAME = ("frontend/test_corpus.py", "zoo/", "hf/", "legacy/", "thirdparty/")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    for item in items:
        place = item.path.relative_to(tests).as_posix() if item.path.is_relative_to(tests) else ""
        name = getattr(item, "callspec", None) and item.callspec.params.get("name")  # type: ignore[attr-defined]
        if isinstance(name, str) and place.startswith(_KEPT_BY_NAME):
            item.add_marker(pytest.mark.xdist_group(f"{place.partition('/')[0]} {name}"))


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    random.seed(0)
    try:
        import torch
    except ImportError:
        return
    torch.manual_seed(0)
