"""What a file needs where it will run: its peak of memory in a process that holds nothing but ONNX Runtime."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

# VmHWM is of this process alone; getrusage's maximum may be that of the one that started it.
_CODE = """
import sys
import numpy, onnxruntime
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
feed = dict(numpy.load(sys.argv[2]))
before = peak()
options = onnxruntime.SessionOptions()
options.log_severity_level = 3
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
session.run(None, {one.name: feed[one.name] for one in session.get_inputs()})
print(peak() - before)
"""


def peak_memory(path: Path, feed: Mapping[str, Any]) -> int | None:
    """Bytes that loading and one run with ONNX Runtime's defaults add at most; None where the system does not tell."""
    if not Path("/proc/self/status").exists():
        return None
    with tempfile.TemporaryDirectory(prefix="moec-") as folder:
        inputs = Path(folder) / "inputs.npz"
        np.savez(inputs, **feed)
        command = [sys.executable, "-c", _CODE, str(path.resolve()), str(inputs)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1][:200]
        raise RuntimeError(f"a clean process does not run it: {reason}")
    return int(done.stdout)
