"""What moec runs on: versions, CPU and devices, for reports and bug reports. Imports torch only in devices()."""

from __future__ import annotations

import functools
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "moec",
    "torch",
    "numpy",
    "safetensors",
    "transformers",
    "rich",
    "triton",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
)

# The instruction sets that decide how fast experts run on a CPU, as Linux spells them -> as people spell them.
_FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "amx_bf16": "AMX BF16",
    "amx_int8": "AMX INT8",
    "asimd": "NEON",
    "bf16": "NEON BF16",
    "i8mm": "NEON I8MM",
    "sve": "SVE",
}


def versions() -> dict[str, str]:
    """Installed versions of Python and of the packages that matter to moec; what is not installed is absent."""
    return {"python": platform.python_version(), **_packages()}


@functools.cache  # reading what is installed takes 10 ms, and every report has it
def _packages() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> str:
    """One line: operating system, CPU, cores this process may use, instruction sets, memory."""
    cpu = _cpuinfo()
    name = cpu.get("model name") or platform.processor() or platform.machine()
    parts = [f"{platform.system()} {platform.machine()}", name, f"{cores()} cores", *cpu_features()]
    memory = memory_bytes()
    if memory is not None:
        parts.append(f"{memory / 2**30:.0f} GiB")
    return ", ".join(parts)


def cores() -> int:
    """Cores this process may run on, which in a container is often fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_features() -> tuple[str, ...]:
    cpu = _cpuinfo()
    flags = set((cpu.get("flags") or cpu.get("Features") or "").split())
    return tuple(name for flag, name in _FEATURES.items() if flag in flags)


def memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def devices() -> list[dict[str, Any]]:
    """The accelerators torch sees, with memory and capability. Imports torch; empty without it."""
    try:
        import torch
    except ImportError:
        return []
    found: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
            }
        )
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": "Apple GPU"})
    return found


def warnings() -> list[str]:
    """Known bad combinations of installed packages, each with what to do."""
    installed = versions()
    found = []
    if "onnxruntime" in installed and "onnxruntime-gpu" in installed:
        found.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files; "
            "uninstall both, then install the one you want"
        )
    if "torch" not in installed:
        found.append("torch is not installed; everything but help, `moec opt` and `moec passes` needs it")
    return found


def _cpuinfo() -> dict[str, str]:
    """The first processor's entry of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    first = text.split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}
