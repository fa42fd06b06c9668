"""What moec says about the machine."""

from __future__ import annotations

import platform
from importlib import metadata

import pytest

from moec import environment


def test_versions_are_those_installed() -> None:
    found = environment.versions()
    assert found["python"] == platform.python_version()
    assert found["torch"] == metadata.version("torch")
    assert "no-such-package" not in found


def test_machine_is_one_line_with_the_cores_this_process_has() -> None:
    line = environment.machine()
    assert "\n" not in line
    assert f"{environment.cores()} cores" in line
    assert platform.machine() in line


def test_cpu_features_are_named_as_people_name_them(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"model name": "A CPU", "flags": "sse avx2 avx512f amx_bf16"}
    monkeypatch.setattr(environment, "_cpuinfo", lambda: entry)
    assert environment.cpu_features() == ("AVX2", "AVX-512", "AMX BF16")
    assert "A CPU" in environment.machine()


def test_a_machine_without_cpuinfo_still_has_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_cpuinfo", dict)
    assert platform.system() in environment.machine()


def test_both_onnxruntimes_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.warnings() == []
    monkeypatch.setattr(environment, "versions", lambda: {"onnxruntime": "1", "onnxruntime-gpu": "1"})
    both, torch_missing = environment.warnings()
    assert "overwrite each other's files" in both
    assert torch_missing.startswith("torch is not installed")
