"""What a file takes where it will run: time and memory in a process that holds nothing but ONNX Runtime."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# VmHWM is of this process alone; getrusage's maximum may be that of the one that started it.
_CODE = """
import json, os, sys, time
import numpy, onnxruntime
def peak():
    if not os.path.exists("/proc/self/status"):
        return None
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
path, inputs = sys.argv[1:]
feed = dict(numpy.load(inputs))
before = peak()
options = onnxruntime.SessionOptions()
options.log_severity_level = 3
start = time.perf_counter()
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
seconds = time.perf_counter() - start
session.run(None, {one.name: feed[one.name] for one in session.get_inputs()})
print(json.dumps([seconds, before and peak() - before]))
"""


@dataclass(frozen=True)
class Apart:
    """How long loading took, and the bytes that loading and one run added at most, where the system tells."""

    load_seconds: float
    peak_bytes: int | None


def run_apart(path: Path, feed: Mapping[str, Any]) -> Apart:
    """Load a file and run it once, with ONNX Runtime's defaults. Raises RuntimeError with the reason if that fails."""
    with tempfile.TemporaryDirectory(prefix="moec-") as folder:
        inputs = Path(folder) / "inputs.npz"
        np.savez(inputs, **feed)
        command = [sys.executable, "-c", _CODE, str(path.resolve()), str(inputs)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1][:200]
        raise RuntimeError(f"a process of its own does not run it: {reason}")
    return Apart(*json.loads(done.stdout))
