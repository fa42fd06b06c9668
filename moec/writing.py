"""Files appear whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from moec.errors import MoecError


def check_writable(path: Path) -> None:
    """MOEC607 if a file could not be put at path; asked before long work whose result goes there."""
    if path.is_dir():
        raise MoecError("MOEC607", f"cannot write {path}: it is a folder", hint="name a file")
    if not path.parent.is_dir():
        raise MoecError("MOEC607", f"cannot write {path}: there is no folder {path.parent}", hint="make it first")
    if not os.access(path.parent, os.W_OK):
        raise MoecError("MOEC607", f"cannot write {path}: {path.parent} is read-only", hint="name another place")


def write_text(path: Path, text: str) -> None:
    """Put text at path in one step: a reader sees the old file or the new one."""
    check_writable(path)
    try:
        handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    except OSError as error:
        raise MoecError("MOEC607", f"cannot write {path}: {error.strerror}", hint="name another place") from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(scratch, _mode(path))
        os.replace(scratch, path)
    except OSError as error:
        raise MoecError("MOEC607", f"cannot write {path}: {error.strerror}", hint="name another place") from error
    finally:
        Path(scratch).unlink(missing_ok=True)


def _mode(path: Path) -> int:
    """The permissions path has or would get from open(); mkstemp's own are for its owner only."""
    if path.exists():
        return path.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
