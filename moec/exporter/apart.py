"""How long a large file takes to load and what memory it needs, in a process that has only ONNX Runtime."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moec.exporter.result import ExportReport

CODE = """
import json, resource, sys, time
import numpy, onnxruntime
path, inputs, threads = sys.argv[1:]
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
before = peak()
options = onnxruntime.SessionOptions()
options.log_severity_level = 3
options.intra_op_num_threads = int(threads)
start = time.perf_counter()
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
seconds = time.perf_counter() - start
given = numpy.load(inputs)
session.run(None, {one.name: given[one.name] for one in session.get_inputs()})
print(json.dumps([seconds, peak() - before]))
"""


def load_apart(path: Path, feed: Mapping[str, Any], report: ExportReport, threads: int = 0) -> None:
    """Enter both in the report; where the process fails, say so."""
    with tempfile.TemporaryDirectory(prefix="moec-") as folder:
        inputs = Path(folder) / "inputs.npz"
        np.savez(inputs, **feed)
        command = [sys.executable, "-c", CODE, str(path.resolve()), str(inputs), str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word of why"])[-1]
        report.notes.append(f"the file was not loaded in a process of its own: {last[:200]}")
        return
    report.load_seconds, report.memory_bytes = json.loads(done.stdout)
