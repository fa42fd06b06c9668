"""A small file with a layer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.onnx import written


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written.dense(tmp_path_factory.mktemp("read") / "in.onnx")
