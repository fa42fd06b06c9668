"""Reading ONNX files: what is wrong with a file is said once, before anything is done with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moec.errors import MoecError
from moec.frontends.onnx.home import LARGE, SPLIT, Home
from moec.frontends.onnx.shapes import infer_shapes

# What is written into the graph needs this opset; ONNX's own converter lifts older files.
LEAST_OPSET = 18


def load(path: Path) -> tuple[Any, Home | None]:
    """The file as an onnx-ir model of opset 18 or newer; of a large one the weights stay in files, in a folder.

    Raises MOEC601 for a file that is not there, MOEC707 for one that is no ONNX file, or whose weights are missing or
    lie outside its folder.
    """
    if not path.is_file():
        raise MoecError("MOEC601", f"{path}: no such file")
    import onnx_ir as ir
    from onnx_ir.passes import common

    home = Home() if path.stat().st_size > LARGE else None
    try:
        model = ir.load(path) if home is None else home.split(path)
    except MoecError:
        raise
    except Exception as error:  # protobuf and onnx-ir raise many kinds
        raise _unreadable(path, f"it is no ONNX file, or it is cut off: {_line(error)}") from error
    if not len(model.graph) or "" not in model.opset_imports:
        raise _unreadable(path, "it holds no graph of ONNX nodes")
    for value in (value for graph in model.graphs() for value in graph.initializers.values()):
        if isinstance(value.const_value, ir.ExternalTensor) and value.const_value.location != SPLIT:
            _check_external(path, value.const_value)
    try:
        common.LiftSubgraphInitializersToMainGraphPass()(model)
        large = weight_bytes(model) > LARGE
    except Exception as error:  # sizes of types that do not exist
        raise _unreadable(path, f"its graph is damaged: {_line(error)}") from error
    if home is None and large:
        home = Home()
    if home is not None:
        home.take(model, path.parent)
    if home is None or model.opset_imports[""] < LEAST_OPSET:
        # ONNX Runtime takes parts of the model without the folder it came from, and so does the converter.
        model, home = ir.external_data.load_to_model(model), None
    if model.opset_imports[""] < LEAST_OPSET:
        model = _converted(path, model)
    try:
        model = _tidied(model)
        ir.to_proto(model)  # which parts of it are made again for ONNX Runtime
        return model, home
    except Exception as error:  # passes of onnx-ir raise what they meet in a damaged graph
        raise _unreadable(path, f"its graph is damaged: {_line(error)}") from error


def weight_bytes(model: Any) -> int:
    """The bytes of all weights."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def _tidied(model: Any) -> Any:
    """The same model with its functions inlined, constants as initializers, and types and sizes where they follow."""
    import onnx_ir as ir
    from onnx_ir.passes import common

    found = ir.passes.Sequential(
        common.InlinePass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.NameFixPass(),
    )(model).model
    infer_shapes(found)
    return found


def _check_external(path: Path, tensor: Any) -> None:
    folder = path.parent.resolve()
    file = (folder / str(tensor.location)).resolve()
    if not file.is_relative_to(folder):
        raise _unreadable(path, f"the weights of {tensor.name} lie outside its folder, in {tensor.location}")
    if not file.is_file():
        raise _unreadable(path, f"the weights of {tensor.name} are missing: there is no {tensor.location} beside it")
    if file.stat().st_size < (tensor.offset or 0) + (tensor.length or 0):
        raise _unreadable(path, f"{tensor.location} beside it is cut off before the weights of {tensor.name}")


def _converted(path: Path, model: Any) -> Any:
    import onnx
    import onnx_ir as ir

    found = model.opset_imports[""]
    try:
        proto = onnx.version_converter.convert_version(ir.to_proto(model), LEAST_OPSET)
        return ir.from_proto(proto)
    except Exception as error:  # the converter raises plain RuntimeErrors
        raise _unreadable(path, f"opset {found} could not be converted to {LEAST_OPSET}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _unreadable(path: Path, why: str) -> MoecError:
    return MoecError("MOEC707", f"{path} cannot be read: {why}")
