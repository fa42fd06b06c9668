"""Ops whose result is wider than their input, from torch to ONNX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from moec.exporter.wider import widen_first

WIDE = torch.float32
OPS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda z: torch.softmax(z, -1, dtype=WIDE),
    "log_softmax": lambda z: torch.log_softmax(z, -1, dtype=WIDE),
    "sum": lambda z: z.sum(-1, dtype=WIDE),
    "sum of all": lambda z: z.sum(dtype=WIDE),
    "mean": lambda z: z.mean(-1, dtype=WIDE),
    "cumsum": lambda z: z.cumsum(-1, dtype=WIDE),
}


class Op(torch.nn.Module):
    def __init__(self, op: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.op = op

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.op(z)


def run(program: Any, z: torch.Tensor) -> Any:
    written = torch.onnx.export(program, dynamo=True, verbose=False)
    assert written is not None
    proto = written.model_proto.SerializeToString()
    runtime = onnxruntime.InferenceSession(proto, providers=["CPUExecutionProvider"])
    return runtime.run(None, {runtime.get_inputs()[0].name: z.numpy()})[0]


@pytest.mark.parametrize("name", OPS)
def test_it_is_computed_in_the_wider_type(name: str) -> None:
    z = (torch.randn(7, 64) * 3 + 20).half()
    program = torch.export.export(Op(OPS[name]).eval(), (z,))
    widen_first(program)
    assert np.allclose(run(program, z), OPS[name](z).numpy(), rtol=1e-5, atol=1e-6)


def test_the_choice_of_experts_stays_with_near_ties() -> None:
    z = (torch.tensor([[1.0, 1.0 + 2**-10, 1.0 - 2**-11, 1.0 + 2**-9]]) * torch.ones(3, 1)).half()
    program = torch.export.export(Op(lambda z: torch.softmax(z, -1, dtype=WIDE).topk(2).indices).eval(), (z,))
    widen_first(program)
    assert run(program, z).tolist() == [[3, 1]] * 3


def test_ops_that_widen_nothing_stay() -> None:
    z = torch.randn(3, 5)
    program = torch.export.export(Op(lambda z: torch.softmax(z, -1, dtype=WIDE) + z.sum()).eval(), (z,))
    before = [node.target for node in program.graph.nodes]
    widen_first(program)
    assert [node.target for node in program.graph.nodes] == before
