"""What all tests share: random numbers that start the same, and hypothesis without a clock."""

from __future__ import annotations

import os
import random

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


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    random.seed(0)
    try:
        import torch
    except ImportError:
        return
    torch.manual_seed(0)
