"""The kernels of gradients compile for every GPU that moec supports, without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

NAMES = {"bias_gradient", "hidden_gradient", "input_gradient", "train_in", "weight_gradient", "weight_sums"}


@pytest.mark.parametrize("capability", [80, 89, 90])
def test_all_kernels_compile(capability: int, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[4]
    command = [sys.executable, "-m", "tests.backends.triton.kernels.compile_recording", str(capability)]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=False)
    assert found.returncode == 0, found.stderr[-3000:]
    assert set(found.stdout.split()) >= NAMES
