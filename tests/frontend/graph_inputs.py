"""Models that torch traces, and their graphs: fx.GraphModule, ExportedProgram, and those of torch.compile.

B sequences, S tokens a sequence, D width, E experts, K experts a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from moec.dynamo import moec_backend, reports

D, E, WIDE, WORDS = 8, 4, 12, 30
AUTO = torch.export.Dim.AUTO
SIZES = ((2, 5), (3, 9), (1, 17))


class Batched(nn.Module):
    """Top-2 of E experts whose weights are gathered for each token: torch can trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E)
        self.gate_up = nn.Parameter(torch.randn(E, 2 * WIDE, D) / 3)
        self.down = nn.Parameter(torch.randn(E, D, WIDE) / 3)

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.router(rows).softmax(-1).topk(2)
        return weights, ids

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, D)
        weights, ids = self.route(rows)
        gate, up = torch.einsum("td,tkhd->tkh", rows, self.gate_up[ids]).chunk(2, -1)
        y = torch.einsum("tkh,tkdh->tkd", F.silu(gate) * up, self.down[ids])
        return (y * weights[..., None]).sum(1).reshape(x.shape)


class WrittenTo(Batched):
    """Its weights are normalised in place, and read again."""

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(rows)
        weights.div_(weights.sum(-1, keepdim=True))
        return weights, ids


class Noted(Batched):
    """The router's logits are a result of their own."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), self.router(x.reshape(-1, D))


class Block(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.norm, self.mixture, self.last = nn.LayerNorm(D), kind(), nn.LayerNorm(D)
        self.up, self.down = nn.Linear(D, 40), nn.Linear(40, D)

    def forward(self, h: Tensor) -> Any:
        y = self.mixture(self.norm(h))
        y, noted = y if isinstance(y, tuple) else (y, None)
        h = h + y
        h = h + self.down(F.gelu(self.up(self.last(h))))
        return h if noted is None else (h, noted)


class Net(nn.Module):
    """Blocks of a mixture and a plain FFN, between an embedding and a head."""

    def __init__(self, kind: type[nn.Module] = Batched, blocks: int = 2) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(WORDS, D), nn.Linear(D, WORDS)
        self.blocks = nn.ModuleList(Block(kind) for _ in range(blocks))

    def forward(self, ids: Tensor) -> Any:
        h, notes = self.embedding(ids), []
        for block in self.blocks:
            h = block(h)
            if isinstance(h, tuple):
                h, noted = h
                notes.append(noted)
        return (self.head(h), *notes) if notes else self.head(h)


def net(kind: type[nn.Module] = Batched, blocks: int = 2) -> Net:
    torch.manual_seed(0)
    return Net(kind, blocks).eval()


def words(b: int, s: int) -> Tensor:
    return torch.randint(0, WORDS, (b, s), generator=torch.Generator().manual_seed(b * 100 + s))


def exported(model: nn.Module) -> Any:
    return torch.export.export(model, (words(2, 5),), dynamic_shapes=({0: AUTO, 1: AUTO},))


def layers_in(graph: fx.Graph) -> int:
    return sum(node.target is torch.ops.moec.layer.default for node in graph.nodes)


KINDS = [Batched, WrittenTo, Noted]


def run_traced(model: nn.Module, *, dynamic: bool | None = True, **options: Any) -> Any:
    torch._dynamo.reset()
    reports.clear()
    return torch.compile(
        model, backend=moec_backend, fullgraph=True, dynamic=dynamic, options={"inner": "eager", **options}
    )
