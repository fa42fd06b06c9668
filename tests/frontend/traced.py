"""Compiled models as torch.export and torch.compile write them down.

B sequences, S tokens a sequence, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import moec
from tests.frontend import changing
from tests.frontend.changing import made

AUTO = torch.export.Dim.AUTO
SIZES = ((2, 5), (3, 7), (1, 40), (4, 1))


def tokens(b: int, s: int) -> Tensor:
    return torch.randn(b, s, changing.D, generator=torch.Generator().manual_seed(b * 100 + s))


def both(kind: type[nn.Module], **options: Any) -> tuple[Any, Any]:
    model = made(kind)
    return model, moec.compile(model, strict=True, **options)


def exported(model: nn.Module, *, strict: bool = False) -> Any:
    return torch.export.export(model, (tokens(2, 5),), dynamic_shapes=({0: AUTO, 1: AUTO},), strict=strict)


def layers_in(program: Any) -> int:
    return sum(node.target is torch.ops.moec.layer.default for node in program.graph.nodes)


def in_graph(fast: nn.Module) -> Any:
    torch._dynamo.reset()
    return torch.compile(fast, backend="aot_eager", fullgraph=True, dynamic=True)
