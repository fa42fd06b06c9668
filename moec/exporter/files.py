"""ONNX files that appear whole: written into a folder beside their place, checked, then renamed."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moec.errors import MoecError
from moec.frontends.onnx.home import Home
from moec.writing import check_writable

# A protobuf message holds at most 2 GB, and other nodes need some of it.
MOST_BYTES = 2_000_000_000
# The first release of ONNX Runtime that runs an opset.
LEAST_RUNTIME = {18: "1.14", 19: "1.15", 20: "1.17", 21: "1.18", 22: "1.21", 23: "1.22"}
# Where moec's use of ONNX Runtime's own ops was checked; attributes and defects changed before.
LEAST_CONTRIB = "1.31"


def least_runtime(opset: int, *, contrib: bool = False) -> str:
    """The oldest ONNX Runtime that loads this opset; its own ops were checked in one release."""
    if contrib:
        return LEAST_CONTRIB
    return LEAST_RUNTIME.get(max(18, opset), f"one with opset {opset}")


def check_target(path: Path, source: Path | None) -> None:
    """MOEC706 when the output is the input, MOEC607 where a file could not be put; asked before long work."""
    if source is not None and path.exists() and source.exists() and path.samefile(source):
        raise MoecError("MOEC706", f"{path} is the file that is being read", hint="name another file with -o")
    check_writable(path)


def save(
    model: Any,
    path: Path,
    properties: Mapping[str, str],
    *,
    external: bool | None = None,
    check: Callable[[Path], None] | None = None,
    home: Home | None = None,
    notes: list[str] | None = None,
) -> int:
    """Put the model at `path`, with its weights in `<path>.data` over 2 GB or on request; the bytes of both.

    `check` gets the written file before it appears; what it raises leaves nothing behind. `home` is where the weights
    of a large model lie. `notes` gets what the checker cannot judge.

    Raises MOEC607 where the disk refuses, and what the ONNX checker raises as an assertion: that is our own bug.
    """
    import onnx_ir as ir

    from moec.backends.onnx.runtime import weight_bytes

    model.metadata_props.update(properties)
    beside = weight_bytes(model) > MOST_BYTES if external is None else external
    try:
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial"))
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        scratch = folder / path.name
        data = f"{path.name}.data"
        if home is None or beside:
            ir.save(model, scratch, external_data=data if beside else None)
            _check(scratch, notes)
        else:
            light = home.path / "checked.onnx"
            ir.save(model, light)
            _check(light, notes)
            home.write(model, scratch)
        if check is not None:
            check(scratch)
        written = sum(file.stat().st_size for file in folder.iterdir())
        if beside:
            os.replace(folder / data, path.parent / data)
        os.replace(scratch, path)
        return written
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check(path: Path, notes: list[str] | None) -> None:
    """ONNX's checker, which gives up at an op it does not know: ONNX Runtime has some in ONNX's own domain."""
    import onnx

    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        unknown = re.search(r"No Op registered for (\w+)", str(error))
        if unknown is None or notes is None:
            raise
        notes.append(
            f"the ONNX checker does not know {unknown[1]}, which the file came with, and did not judge the rest"
        )


def _unwritable(path: Path, error: OSError) -> MoecError:
    return MoecError("MOEC607", f"cannot write {path}: {error.strerror or error}", hint="name another place")
