"""What several of these tests start from."""

from __future__ import annotations

import pytest

from tests.frontend_units.installed import Installed


@pytest.fixture
def layer() -> Installed:
    """A layer with its compiled method in place."""
    return Installed()
