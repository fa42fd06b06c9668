"""ONNX files too large to be held twice: weights moved beside the model as it is read, and back as it is written.

What is read and written is protobuf's wire format: fields of a tag and a value, lengths in front of what is nested.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9  # fields of ModelProto, GraphProto and TensorProto
NESTED, VARINT, FIXED64, FIXED32 = 2, 0, 1, 5
# Weights below this stay in the model.
SMALL = 1 << 16
ALIGNED = 4096
CHUNK = 1 << 24


def split(path: Path, data: Path) -> Any:
    """The model of a file, its large weights copied to `data` and named as lying there.

    Raises ValueError, or protobuf's DecodeError, for what is no such message.
    """
    import onnx

    model = onnx.ModelProto()
    size = path.stat().st_size
    with path.open("rb") as source, data.open("wb") as beside:
        for field, start, end in _fields(source, size):
            if field != GRAPH:
                model.MergeFromString(_bytes(source, start, end))
                continue
            body = _nested(source, start)
            for inner, first, last in _fields(source, end, body):
                if inner == INITIALIZER:
                    model.graph.initializer.append(_initializer(source, first, last, beside, data.name))
                else:
                    model.graph.MergeFromString(_bytes(source, first, last))
    return model


def _initializer(source: BinaryIO, start: int, end: int, beside: BinaryIO, name: str) -> Any:
    import onnx

    tensor = onnx.TensorProto()
    for field, first, last in _fields(source, end, _nested(source, start)):
        body = _nested(source, first) if field == RAW_DATA else first
        if field != RAW_DATA or last - body < SMALL:
            tensor.MergeFromString(_bytes(source, first, last))
            continue
        offset = -(-beside.tell() // ALIGNED) * ALIGNED
        beside.seek(offset)
        source.seek(body)
        _copy(source, beside, last - body)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", name), ("offset", offset), ("length", last - body)):
            tensor.external_data.add(key=key, value=str(value))
    return tensor


def _fields(source: BinaryIO, end: int, start: int = 0) -> Iterator[tuple[int, int, int]]:
    """Number, start of the tag and end of each field between two places."""
    at = start
    while at < end:
        source.seek(at)
        tag = _varint(source)
        kind = tag & 7
        if kind == NESTED:
            length = _varint(source)
            after = source.tell() + length
        elif kind == VARINT:
            _varint(source)
            after = source.tell()
        elif kind in (FIXED64, FIXED32):
            after = source.tell() + (8 if kind == FIXED64 else 4)
        else:
            raise ValueError(f"a field of kind {kind}")
        if after > end:
            raise ValueError("a field ends behind what holds it")
        yield tag >> 3, at, after
        at = after


def _nested(source: BinaryIO, start: int) -> int:
    """Where the contents of a nested field begin."""
    source.seek(start)
    _varint(source)
    _varint(source)
    return source.tell()


def _varint(source: BinaryIO) -> int:
    value = shift = 0
    while True:
        byte = source.read(1)
        if not byte or shift > 63:
            raise ValueError("it is cut off")
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return value
        shift += 7


def _bytes(source: BinaryIO, start: int, end: int) -> bytes:
    source.seek(start)
    return source.read(end - start)


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    while size:
        chunk = source.read(min(CHUNK, size))
        if not chunk:
            raise ValueError("it is cut off")
        target.write(chunk)
        size -= len(chunk)


def write_joined(model: Any, folder: Path, path: Path) -> None:
    """A model whose large weights lie in files of `folder`, as one file that holds them."""
    kept = list(model.graph.initializer)
    del model.graph.initializer[:]
    graph = model.graph.SerializeToString()
    model.ClearField("graph")
    parts = [_described(tensor) for tensor in kept]
    total = len(graph) + sum(_size(INITIALIZER, len(head) + size) for head, _, size in parts)
    with path.open("wb") as target:
        target.write(model.SerializeToString())
        target.write(_tag(GRAPH, total))
        target.write(graph)
        for head, place, size in parts:
            target.write(_tag(INITIALIZER, len(head) + size))
            target.write(head)
            if place is not None:
                with (folder / place[0]).open("rb") as source:
                    source.seek(place[1])
                    _copy(source, target, size)


def _described(tensor: Any) -> tuple[bytes, tuple[str, int] | None, int]:
    """A tensor's own bytes up to its data, where the data lies, and how much it is."""
    import onnx

    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return tensor.SerializeToString(), None, 0
    told = {entry.key: entry.value for entry in tensor.external_data}
    size = int(told["length"])
    light = onnx.TensorProto()
    light.CopyFrom(tensor)
    light.ClearField("external_data")
    light.ClearField("data_location")
    return light.SerializeToString() + _tag(RAW_DATA, size), (told["location"], int(told.get("offset", 0))), size


def _tag(field: int, size: int) -> bytes:
    return _encoded(field << 3 | NESTED) + _encoded(size)


def _size(field: int, size: int) -> int:
    return len(_tag(field, size)) + size


def _encoded(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    found.append(value)
    return bytes(found)


def append(tensors: Sequence[Any], data: Path) -> list[tuple[int, int]]:
    """Write arrays to the end of a file, one after another; offset and length of each."""
    places = []
    with data.open("ab") as target:
        for tensor in tensors:
            offset = -(-target.seek(0, 2) // ALIGNED) * ALIGNED
            target.truncate(offset)
            target.seek(offset)
            contents = tensor.tobytes()
            target.write(contents)
            places.append((offset, len(contents)))
    return places
