"""moec.compile of an .onnx file: something to call, over the file with its MoE layers rewritten, in ONNX Runtime."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moec.backends.onnx.bound import run_tensors
from moec.backends.onnx.providers import check_installed, fast_providers
from moec.backends.onnx.runtime import as_array, session
from moec.environment import machine, versions
from moec.errors import MoecError
from moec.exporter.onnx_file import rewrite
from moec.exporter.result import ExportReport
from moec.exporter.settings import Settings
from moec.progress import show_progress


@dataclass(frozen=True)
class FileHandle:
    """What a compiled file carries as `.moec`."""

    report: ExportReport


class CompiledFile:
    """Runs the file: arguments in the order of its inputs or by their names, torch tensors or numpy arrays.

    Where all are tensors, ONNX Runtime reads their memory, and the results are its own, on the same device.

    Gives the file's outputs in their order, as what went in: one alone where there is one.
    """

    def __init__(self, runtime: Any, report: ExportReport) -> None:
        self.moec = FileHandle(report)
        self._runtime = runtime
        self._inputs = tuple(one.name for one in runtime.get_inputs())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raises MOEC404 where inputs are missing or not the file's."""
        given = dict(zip(self._inputs, args, strict=False)) | kwargs
        wrong = [name for name in self._inputs if name not in given] + [n for n in given if n not in self._inputs]
        if wrong or len(args) > len(self._inputs):
            listed = ", ".join(self._inputs)
            what = f"{wrong[0]} is missing or not among them" if wrong else f"found {len(args)}"
            raise MoecError("MOEC404", f"the file takes {listed}: {what}")
        tensors = [value for value in given.values() if isinstance(value, torch.Tensor)]
        try:
            handed = run_tensors(self._runtime, given) if len(tensors) == len(given) else None
            found = handed if handed is not None else self._runtime.run(None, _arrays(given))
        except Exception as error:  # ONNX Runtime's errors have no common class
            reason = str(error).strip().splitlines()[0][:200]
            raise MoecError("MOEC404", f"the file does not run on these inputs: {reason}") from error
        results = tuple(torch.from_numpy(one) if tensors and isinstance(one, np.ndarray) else one for one in found)
        return results[0] if len(results) == 1 else results


def _arrays(given: Mapping[str, Any]) -> dict[str, Any]:
    return {n: as_array(v.cpu()) if isinstance(v, torch.Tensor) else np.asarray(v) for n, v in given.items()}


def compile_file(path: Path, *, backend: str = "auto", quantize: str | None = None) -> CompiledFile:
    """The file with its layers rewritten and checked, as by moec.export, held in memory. Raises what export raises."""
    if backend not in ("auto", "onnxruntime"):
        hint = 'leave it out, or backend="onnxruntime"'
        raise MoecError("MOEC502", f"backend={backend!r} does not run ONNX files", hint=hint)
    check_installed()
    settings = Settings.make(path, quantize=quantize)
    report = ExportReport(str(path), path, settings.target, quantize)
    start = time.perf_counter()
    with show_progress("compile") as say:
        made = rewrite(path, settings, report, say)
        runtime = session(made.model, threads=torch.get_num_threads(), providers=fast_providers(settings.target))
    report.opset = made.model.opset_imports[""]
    report.versions, report.machine = versions(), machine()
    report.seconds = time.perf_counter() - start
    return CompiledFile(runtime, report)
