"""What does not depend on a graph's inputs: initializers, and values computed from nothing else, read when needed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from moec.frontends.onnx.graphs import graphs_of, with_inner

# Not the same in each run, though nothing goes in.
RANDOM = ("RandomNormal", "RandomUniform", "Bernoulli", "Multinomial", "Dropout")


def _turns(node: Any) -> bool:
    """Whether a node turns each matrix and nothing else: both ways to read one are tried anyway."""
    order = node.attributes.get("perm")
    if node.op_type == "Transpose" and order is not None:
        return tuple(order.as_ints()) in ((1, 0), (0, 2, 1))
    return bool(node.op_type == "Identity")


class Constants:
    """The constants of one graph by what they are; what is computed is computed once, by ONNX Runtime."""

    def __init__(self, model: Any, session_of: Any) -> None:
        self._model, self._session_of = model, session_of
        self._computed: dict[Any, torch.Tensor] = {}
        self._fixed: set[Any] = set()
        for node in model.graph:
            if not node.op_type.startswith(RANDOM) and not graphs_of(node) and all(map(self.holds, node.inputs)):
                self._fixed.update(node.outputs)

    def holds(self, value: Any) -> bool:
        """Whether a value is an initializer, or computed from initializers alone."""
        return value is None or value.const_value is not None or value in self._fixed

    def of(self, nodes: Iterable[Any]) -> list[Any]:
        """The constants that nodes read, and the graphs that they run, each once, in order of use."""
        found: dict[Any, None] = {}
        for node in with_inner(nodes):
            for value in node.inputs:
                if value is not None and self.holds(value):
                    found.setdefault(self._whole(value))
        return list(found)

    def _whole(self, value: Any) -> Any:
        """The stack that a constant is one expert's part of, or what it is turned from; else itself."""
        root, turned = value, True
        while root.const_value is None and root.producer().inputs and root.producer().inputs[0] is not None:
            turned = turned and _turns(root.producer())
            root = root.producer().inputs[0]
        if root.const_value is not None and turned:
            return root
        is_part = root.const_value is not None and len(root.const_value.shape) == 3 == len(self.shape(value)) + 1
        return root if is_part else value

    def shape(self, value: Any) -> tuple[int, ...]:
        """Its sizes, computed only where they do not follow from the graph."""
        if value.const_value is not None:
            return tuple(value.const_value.shape)
        if value.shape is not None and all(isinstance(size, int) for size in value.shape):
            return tuple(value.shape)
        return tuple(self.tensor(value).shape)

    def is_float(self, value: Any) -> bool:
        dtype = value.const_value.dtype if value.const_value is not None else value.dtype
        return dtype is not None and ("FLOAT" in dtype.name or dtype.name == "DOUBLE")

    def tensor(self, value: Any) -> torch.Tensor:
        """It as a tensor, over the file's own memory where it lies in the file."""
        if value.const_value is not None:
            return as_tensor(value.const_value)
        if value not in self._computed:
            import onnx_ir as ir

            part = ir.convenience.extract(self._model.graph, inputs=[], outputs=[value.name])
            part.opset_imports.update(self._model.opset_imports)
            runtime = self._session_of(ir.Model(part, ir_version=self._model.ir_version))
            self._computed[value] = torch.from_numpy(np.ascontiguousarray(runtime.run(None, {})[0]))
        return self._computed[value]


def as_tensor(constant: Any) -> torch.Tensor:
    """An onnx-ir tensor as torch's, without a copy. Nobody writes to it."""
    if constant.dtype.name == "BFLOAT16":
        bits = np.ascontiguousarray(constant.numpy()).view(np.int16)
        return torch.from_numpy(bits).view(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the file is mapped for reading only
        return torch.from_numpy(np.ascontiguousarray(constant.numpy()))
