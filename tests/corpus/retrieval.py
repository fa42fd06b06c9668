"""Product keys that retrieve experts of one hidden unit from tables, and tables that hold no experts.

T tokens, D model width, H heads, K experts a head, N keys of a half, N*N experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.corpus.case import case


@case("retrieval.product_keys", expect="left alone", reason=("one hidden unit",))
class ProductKeys(nn.Module):
    """Two heads, the best two of 8 x 8 experts each; an expert is a row of each table."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Linear(16, 2 * 2 * 6, bias=False)
        self.keys = nn.Parameter(torch.empty(2, 2, 8, 6))
        self.down, self.up = nn.Embedding(64, 16), nn.Embedding(64, 16)

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """scores [T, H, K] and ids [T, H, K]."""
        halves = torch.einsum("tphd,phnd->pthn", self.queries(x).view(-1, 2, 2, 6), self.keys)
        (first, second), (i, j) = halves.topk(2, dim=-1)
        scores, place = (first[..., None] + second[..., None, :]).flatten(-2).topk(2, dim=-1)
        return scores, (8 * i[..., None] + j[..., None, :]).flatten(-2).gather(-1, place)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 16)
        scores, ids = self.choose(rows)
        hidden = F.gelu(torch.einsum("td,thkd->thk", rows, self.down(ids))) * scores.relu()
        return torch.einsum("thk,thkd->td", hidden, self.up(ids)).view_as(x)


@case("retrieval.duplicate_ids", expect="left alone", reason=("one hidden unit",))
class DuplicateIds(ProductKeys):
    """Both heads score alike, so that every id comes twice and counts twice."""

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, ids = super().choose(x)
        return scores, ids[:, :1].expand(ids.shape)


@case("retrieval.other_ids", expect="left alone", unseen=True)
class OtherIds(ProductKeys):
    """The second table is asked for the id after: no expert is a row of each table."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 16)
        scores, ids = self.choose(rows)
        hidden = F.gelu(torch.einsum("td,thkd->thk", rows, self.down(ids))) * scores.relu()
        return torch.einsum("thk,thkd->td", hidden, self.up((ids + 1) % 64)).view_as(x)


@case("retrieval.two_embeddings", expect="left alone", unseen=True)
class TwoEmbeddings(nn.Module):
    """Two tables of one shape whose rows are added to the tokens: nothing to report."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Embedding(12, 16), nn.Embedding(12, 16)

    def forward(self, x: Tensor) -> Tensor:
        ids = (x[..., 0] > 0).long() + 2 * (x[..., 1] > 0).long()
        out: Tensor = x + self.first(ids) + self.second(ids)
        return out
