"""Every kernel compiles for every GPU that moec supports, without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PLAIN = {
    "clear_rows",
    "combine",
    "count_chunks",
    "gemv_in",
    "gemv_out",
    "group_small",
    "place_chunks",
    "route_kernel",
    "sum_chunks",
    "tiles_in",
    "tiles_out",
}


@pytest.mark.parametrize("capability", [80, 89, 90])
def test_all_kernels_compile(capability: int, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[4]
    command = [sys.executable, "-m", "tests.backends.triton.kernels.compile_all", str(capability)]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=False)
    assert found.returncode == 0, found.stderr[-3000:]
    number, *names = found.stdout.split()
    assert number == str(capability)
    assert set(names) >= PLAIN
    assert ("persistent_in" in names) == (capability >= 90)
