"""Collects the ONNX nodes of one region: names by a prefix, constants once, sizes as int64 scalars.

Nodes are of the default domain from opset 18 on, unless a domain is named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from moec.ir import Dim, Names
from moec.ir.dim import Floor, Min

OPSET = 18
DTYPES: dict[str, Any] = {
    "f64": ir.DataType.DOUBLE,
    "f32": ir.DataType.FLOAT,
    "f16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
    "i8": ir.DataType.INT8,
    "i32": ir.DataType.INT32,
    "i64": ir.DataType.INT64,
    "bool": ir.DataType.BOOL,
}


class Emitter:
    """Nodes and initializers, in order. `prefix` is the path of the layer in the model, and starts every name."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.letters: dict[str, Any] = {}
        self.domains: dict[str, int] = {}
        self._names = Names()
        self._constants: dict[tuple[str, tuple[int, ...], bytes], Any] = {}
        self._sizes: dict[Dim, Any] = {}

    def op(self, kind: str, *inputs: Any, name: str | None = None, domain: str = "", **attributes: Any) -> Any:
        """One node with one output, which is returned."""
        return self.op_many(kind, 1, *inputs, name=name, domain=domain, **attributes)[0]

    def op_many(
        self, kind: str, outputs: int, *inputs: Any, name: str | None = None, domain: str = "", **attributes: Any
    ) -> Sequence[Any]:
        """One node with this many outputs."""
        title = self.name(name or kind.lower())
        results = [ir.Value(name=title if outputs == 1 else f"{title}.{index}") for index in range(outputs)]
        node = ir.node(kind, list(inputs), attributes, domain=domain, outputs=results, name=title)
        if domain:
            self.domains[domain] = 1
        self.nodes.append(node)
        return results

    def name(self, wish: str) -> str:
        """The wish behind the prefix, with a number where it is taken."""
        return f"{self.prefix}/{self._names.fresh(wish)}"

    def constant(self, value: np.ndarray[Any, Any], name: str = "constant") -> Any:
        """A small array as an initializer; equal ones are one."""
        key = (str(value.dtype), value.shape, value.tobytes())
        if key not in self._constants:
            title = self.name(name)
            self._constants[key] = self._register(title, ir.Tensor(value, name=title))
        return self._constants[key]

    def ints(self, *values: int) -> Any:
        """int64[n]."""
        return self.constant(np.array(values, dtype=np.int64), "sizes")

    def number(self, value: int) -> Any:
        """An int64 scalar."""
        return self.constant(np.array(value, dtype=np.int64), f"int_{value}".replace("-", "minus_"))

    def scalar(self, value: float, dtype: str) -> Any:
        """A scalar of an element type of the IR."""
        if dtype == "bf16":
            return self.tensor("number", torch.tensor(value, dtype=torch.bfloat16))
        kinds: dict[str, Any] = {
            "f64": np.float64,
            "f32": np.float32,
            "f16": np.float16,
            "i8": np.int8,
            "i32": np.int32,
        }
        kinds |= {"i64": np.int64, "bool": np.bool_}
        return self.constant(np.array(value, dtype=kinds[dtype]), "number")

    def tensor(self, name: str, tensor: torch.Tensor) -> Any:
        """A weight as an initializer, which is read when the file is written. It may have any strides."""
        title = self.name(name)
        return self._register(title, TorchTensor(tensor.detach().cpu().contiguous(), name=title))

    def lazy(self, name: str, make: Callable[[], Any], dtype: Any, shape: Sequence[int]) -> Any:
        """An initializer that `make` gives as an onnx-ir tensor each time it is read, and that nobody holds."""
        title = self.name(name)
        return self._register(title, ir.LazyTensor(make, dtype, ir.Shape(shape), name=title))

    def _register(self, title: str, tensor: Any) -> Any:
        value = ir.Value(name=title, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
        self.initializers.append(value)
        return value

    # --- casts and shapes ---------------------------------------------------------------------------------------------

    def cast(self, value: Any, dtype: str) -> Any:
        """The value in an element type of the IR."""
        return self.op("Cast", value, to=int(DTYPES[dtype]))

    def shape_of(self, value: Any, axis: int) -> Any:
        """The size of one axis, an int64 scalar."""
        return self.op("Gather", self.op("Shape", value), self.number(axis), axis=0, name="size")

    def vector(self, *sizes: Any) -> Any:
        """int64[n] of whole numbers and int64 scalars."""
        if all(isinstance(size, int) for size in sizes):
            return self.ints(*sizes)
        parts = [self.ints(s) if isinstance(s, int) else self.op("Unsqueeze", s, self.ints(0)) for s in sizes]
        return parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=0, name="sizes")

    def reshape(self, value: Any, *sizes: Any) -> Any:
        """-1 is the rest; no size is copied from the input, so 0 is 0."""
        return self.op("Reshape", value, self.vector(*sizes), allowzero=int(-1 not in sizes))

    def full(self, value: float, dtype: str, *sizes: Any) -> Any:
        """A tensor of these sizes filled with the value."""
        if dtype in ("f16", "bf16"):  # which ONNX Runtime does not expand
            return self.cast(self.full(value, "f32", *sizes), dtype)
        return self.op("Expand", self.scalar(value, dtype), self.vector(*sizes), name="fill")

    def zero_where(self, missing: Any, rows: Any, dtype: str) -> Any:
        """Rows[R, D] with zeros where missing[R, 1]; ONNX Runtime cannot choose among 16-bit numbers."""
        wide = self.cast(rows, "f32") if dtype in ("f16", "bf16") else rows
        found = self.op("Where", missing, self.scalar(0, "f32" if wide is not rows else dtype), wide)
        return found if wide is rows else self.cast(found, dtype)

    def range(self, count: Any) -> Any:
        """int64: 0, 1, ... count-1."""
        return self.op("Range", self.number(0), count, self.number(1))

    # --- sizes ------------------------------------------------------------------------------------------------------

    def bind(self, size: Dim, found: Any) -> None:
        """Learn a letter from the size of an input where it stands alone with numbers (`2T + 1`)."""
        terms = dict(size.terms)
        rest = terms.pop((), Fraction(0))
        if len(terms) != 1:
            return
        ((monomial, factor),) = terms.items()
        if len(monomial) != 1 or monomial[0][1] != 1 or not isinstance(monomial[0][0], str):
            return
        letter = monomial[0][0]
        if letter in self.letters or rest.denominator != 1:
            return
        value = found if rest == 0 else self.op("Sub", found, self.number(int(rest)))
        value = value if factor.denominator == 1 else self.op("Mul", value, self.number(factor.denominator))
        self.letters[letter] = value if factor.numerator == 1 else self.op("Div", value, self.number(factor.numerator))

    def size(self, size: Dim) -> Any:
        """The size in a call: a whole number where it is constant, else an int64 scalar."""
        if size.constant is not None:
            return size.constant
        if size not in self._sizes:
            self._sizes[size] = self._size(size)
        return self._sizes[size]

    def size_value(self, size: Dim) -> Any:
        """The size as an int64 scalar, also where it is constant."""
        found = self.size(size)
        return self.number(found) if isinstance(found, int) else found

    def _size(self, size: Dim) -> Any:
        """A polynomial over its common denominator; the whole of it is divisible."""
        common = 1
        for _, factor in size.terms:
            common = common * factor.denominator // np.gcd(common, factor.denominator)
        total = None
        for monomial, factor in size.terms:
            term = self.number(int(factor * int(common)))
            for atom, power in monomial:
                for _ in range(power):
                    term = self.op("Mul", term, self._atom(atom))
            total = term if total is None else self.op("Add", total, term)
        return total if common == 1 else self._floor_div(total, self.number(int(common)))

    def _atom(self, atom: str | Floor | Min) -> Any:
        if isinstance(atom, str):
            return self.letters[atom]
        if isinstance(atom, Floor):
            return self._floor_div(self.size_value(atom.num), self.size_value(atom.den))
        return self.op("Min", *(self.size_value(arg) for arg in atom.args))

    def _floor_div(self, a: Any, b: Any) -> Any:
        """Rounded down; ONNX's own division of integers rounds towards zero, and a numerator may be negative."""
        return self.op("Div", self.op("Sub", a, self.op("Mod", a, b, fmod=0)), b)
