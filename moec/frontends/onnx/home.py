"""A folder for the weights of a large model while it is rewritten: read and written in files, not held in memory."""

from __future__ import annotations

import mmap
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moec.errors import MoecError
from moec.frontends.onnx.wire import SMALL, append, split, write_joined

# Models with fewer bytes of weights than this are held in memory.
LARGE = 1 << 28
# The file for weights that lay in the model; nobody's own file is called so.
SPLIT = ".moec-split.data"


class Home:
    """The folder, which goes with this object."""

    def __init__(self) -> None:
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="moec-", ignore_cleanup_errors=True)
        except OSError as error:
            raise _full(error) from error
        self.path = Path(self._folder.name)

    def split(self, path: Path) -> Any:
        """A file's model as onnx-ir, its large weights in this folder. Raises what `wire.split` raises."""
        import onnx_ir as ir

        try:
            proto = split(path, self.path / SPLIT)
        except OSError as error:
            raise _full(error) from error
        return ir.from_proto(proto)

    def take(self, model: Any, folder: Path) -> None:
        """Weights that were split off, and those that lie beside a model in files of its own folder."""
        import onnx_ir as ir

        names = {SPLIT: SPLIT}
        for value in model.graph.initializers.values():
            told = value.const_value
            if not isinstance(told, ir.ExternalTensor):
                continue
            name = str(told.location)
            if name not in names:
                names[name] = f"given-{len(names)}.data"
                try:
                    # Neither onnx-ir nor ONNX Runtime follows links out of a folder.
                    shutil.copyfile(folder / name, self.path / names[name])
                except OSError as error:
                    raise _full(error) from error
            value.const_value = self._tensor(told, names[name], told.offset or 0, told.nbytes)

    def _tensor(self, like: Any, name: str, offset: int, length: int) -> Any:
        import onnx_ir as ir

        return ir.ExternalTensor(
            name, offset, length, like.dtype, shape=like.shape, name=like.name, base_dir=self.path
        )  # fmt: skip

    def keep(self, values: Iterable[Any]) -> None:
        """Initializers that were made anew: into a file here."""
        import onnx_ir as ir

        new = [v for v in values if v.const_value.nbytes >= SMALL and not isinstance(v.const_value, ir.ExternalTensor)]
        for value in new:
            try:
                ((offset, length),) = append([value.const_value], self.path / "made.data")
            except OSError as error:
                raise _full(error) from error
            value.const_value = self._tensor(value.const_value, "made.data", offset, length)

    def rest(self, model: Any) -> None:
        """Let go of the pages that were read of the files; they come back when they are read again."""
        for value in model.graph.initializers.values():
            mapped = getattr(value.const_value, "raw", None)
            if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def write(self, model: Any, path: Path) -> None:
        """The model in one file that holds all its weights."""
        import onnx_ir as ir

        write_joined(ir.to_proto(model), self.path, path)


def _full(error: OSError) -> MoecError:
    what = f"there is no room for the weights while the file is rewritten: {error.strerror or error}"
    return MoecError("MOEC607", what, hint=f"free space in {tempfile.gettempdir()}, or set TMPDIR to another folder")
