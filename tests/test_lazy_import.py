"""`import moec`, the IR, the passes and the command line's help load no framework; the public names are all there."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import moec
import moec.ir
import moec.passes

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "triton", "onnx", "onnxruntime", "rich", "numpy")
LIGHT = [
    "moec",
    "moec.errors",
    "moec.options",
    "moec.report",
    "moec.pipeline",
    "moec.environment",
    "moec.cli",
    *(module.name for module in pkgutil.walk_packages(moec.ir.__path__, "moec.ir.")),
    *(module.name for module in pkgutil.walk_packages(moec.passes.__path__, "moec.passes.")),
]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_light_modules_load_nothing_heavy() -> None:
    code = (
        "import importlib, sys\n"
        f"for name in {LIGHT!r}:\n"
        "    importlib.import_module(name)\n"
        f"    loaded = sorted(set({HEAVY!r}) & set(sys.modules))\n"
        "    assert not loaded, f'{name} loads {loaded}'\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", moec.__all__)
def test_public_names_load(name: str) -> None:
    assert getattr(moec, name) is not None
    assert name in dir(moec)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'complie'"):
        moec.complie  # noqa: B018


@pytest.mark.parametrize("folder", ["passes", "backends"])
def test_folders_at_the_root_refuse_to_be_top_level_packages(folder: str) -> None:
    done = run_python(f"import {folder}")
    assert done.returncode != 0
    assert f"ImportError: import moec.{folder}, not {folder}" in done.stderr
    assert importlib.import_module(f"moec.{folder}").__name__ == f"moec.{folder}"
