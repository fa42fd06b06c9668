"""Inputs for an ONNX file, made up from the types and sizes of its inputs, or read from an .npz file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moec.errors import MoecError

Feed = dict[str, Any]
# The first dynamic size and all others; the first row is what layers are solved on.
MOST = 1 << 27
SIZES = ((2, 17), (3, 5), (1, 40), (1, 1))
# Of a large model, which may gather the weights of every slot.
FEW = ((1, 2), (2, 1), (1, 1))


def feeds(model: Any, given: Path | None = None, *, few: bool = False) -> list[tuple[str, Feed]]:
    """Inputs by a label, `few` of a few tokens. Raises MOEC708 where one cannot be made up, or the file lacks one."""
    if given is not None:
        return [(given.name, _read(model, given))]
    found = []
    for first, rest in FEW if few else SIZES:
        generator = np.random.default_rng(first + rest)
        sizes = _only(model, rest)
        feed = {value.name: _invent(value, first, rest, sizes, generator) for value in model.graph.inputs}
        label = " ".join(f"{name}={size}" for name, size in sizes.items())
        found.append((label or "its own shape", feed))
    labels = [label for label, _ in found]
    return [one for index, one in enumerate(found) if one[0] not in labels[:index]]


def sized(model: Any, tokens: int) -> Feed:
    """Inputs with 1 for the first dynamic size and `tokens` for all others."""
    generator, sizes = np.random.default_rng(tokens), _only(model, tokens)
    return {value.name: _invent(value, 1, tokens, sizes, generator) for value in model.graph.inputs}


def _only(model: Any, size: int) -> dict[str, int]:
    """The one dynamic size, where there is one: it counts tokens, wherever it stands."""
    shapes = [value.shape or () for value in model.graph.inputs]
    names = {one.value for shape in shapes for one in shape if not isinstance(one, int)}
    return {name: size for name in names if name} if len(names) == 1 else {}


def _read(model: Any, path: Path) -> Feed:
    try:
        with np.load(path) as held:
            arrays = {name: held[name] for name in held.files}
    except (OSError, ValueError) as error:
        raise MoecError("MOEC708", f"{path} is no .npz file: {error}", hint="np.savez(path, input_ids=ids)") from error
    missing = [value.name for value in model.graph.inputs if value.name not in arrays]
    if missing:
        raise MoecError("MOEC708", f"{path} has no array called {missing[0]}", hint=f"it has {', '.join(arrays)}")
    return arrays


def _invent(value: Any, first: int, rest: int, sizes: dict[str, int], generator: np.random.Generator) -> Any:
    if value.shape is None or value.dtype is None:
        raise MoecError("MOEC708", f"the input {value.name} has no type or no rank", hint="hand one over with --inputs")
    for axis, size in _cache_sizes(value).items():
        if not isinstance(value.shape[axis], int) and value.shape[axis].value:
            sizes.setdefault(value.shape[axis].value, size)
    shape = [_size(size, axis, first, rest, sizes) for axis, size in enumerate(value.shape)]
    if math.prod(shape) > MOST:
        raise MoecError("MOEC708", f"the input {value.name} has {math.prod(shape)} elements", hint="use --inputs")
    kind = value.dtype.numpy()
    if "mask" in value.name or value.dtype.name == "BOOL":
        return np.ones(shape, kind)
    if np.issubdtype(kind, np.integer):
        return generator.integers(0, _vocabulary(value), shape).astype(kind)
    return generator.standard_normal(shape).astype(kind)


def _size(size: Any, axis: int, first: int, rest: int, sizes: dict[str, int]) -> int:
    if isinstance(size, int):
        return size
    name = size.value or f"axis {axis}"
    if name not in sizes and " + " in name:  # what came before, and what comes now
        parts = [part.strip() for part in name.split("+")]
        return sum(int(p) if p.isdecimal() else _size(_Named(p), axis, first, rest, sizes) for p in parts)
    if name not in sizes:
        sizes[name] = 0 if name.startswith("past") else first if axis == 0 and not sizes else rest
    return sizes[name]


@dataclass(frozen=True)
class _Named:
    """A size by its name."""

    value: str


def _cache_sizes(value: Any) -> dict[int, int]:
    """Sizes of a cache of keys or values by axis, where the op that reads it tells them."""
    for node, index in value.uses():
        if node.op_type == "GroupQueryAttention" and index in (3, 4):
            heads, pairs = (node.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
            width, packed = _width(node.inputs[0]), node.inputs[1] is None
            return {3: width // (heads + 2 * pairs if packed else heads)} if width else {}
    return {}


def _width(value: Any) -> int | None:
    """The last size of a value, from its shape or from the weights that it is a product with or a sum of."""
    for _ in range(4):
        if value.const_value is not None:
            return int(value.const_value.shape[-1])
        if value.shape is not None and len(value.shape) and isinstance(value.shape[-1], int):
            return int(value.shape[-1])
        node = value.producer()
        if node is None or node.op_type not in ("MatMul", "Add"):
            return None
        value = node.inputs[1]
    return None


def _vocabulary(value: Any) -> int:
    """How many numbers an integer input may hold: the rows of the table that it looks up, however indirectly."""
    seen, todo = set(), [value]
    while todo:
        one = todo.pop()
        for node, index in one.uses():
            if node.op_type == "Gather" and index == 1:
                table = node.inputs[0].const_value
                if table is not None and len(table.shape) == 2:
                    return int(table.shape[0])
            if node not in seen and node.op_type in ("Cast", "Reshape", "Unsqueeze", "Squeeze", "Identity"):
                seen.add(node)
                todo += node.outputs
    return 2
