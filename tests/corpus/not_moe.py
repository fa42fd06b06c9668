"""Modules whose parameters look like experts and are not: nothing may be compiled as a mixture here."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.corpus.case import case


@case("not_moe.split_ffn", unseen=True)
class SplitFfn(nn.Module):
    """One dense FFN whose inner width is cut into four groups: a sum of four 'experts' with weight one."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(4, 10, 16))
        self.down = nn.Parameter(torch.empty(4, 16, 10))

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(torch.einsum("...d,gfd->...gf", x, self.up))
        return torch.einsum("...gf,gdf->...d", h, self.down)


@case("not_moe.heads", expect="left alone", unseen=True)
class Heads(nn.Module):
    """Per-head projections as 3-D parameters: E is the number of heads, every head sees every token."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(4, 8, 16))
        self.key = nn.Parameter(torch.empty(4, 8, 16))
        self.value = nn.Parameter(torch.empty(4, 8, 16))
        self.out = nn.Parameter(torch.empty(4, 16, 8))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bsd,hfd->bhsf", x, w) for w in (self.query, self.key, self.value))
        mixed = (q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1) @ v
        return torch.einsum("bhsf,hdf->bsd", mixed, self.out)


@case("not_moe.stack_of_layers", expect="left alone", unseen=True)
class StackOfLayers(nn.Module):
    """Six layers in one 3-D parameter, applied one after the other."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(6, 16, 16))
        self.b = nn.Parameter(torch.empty(6, 16))

    def forward(self, x: Tensor) -> Tensor:
        for w, b in zip(self.w, self.b, strict=True):
            x = x + torch.tanh(F.linear(x, w, b))
        return x


@case("not_moe.list_of_ffns", kind="ffn", layers=5, unseen=True)
class ListOfFfns(nn.Module):
    """Five equal FFNs in a ModuleList, applied one after the other: layers, not experts."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@case("not_moe.ensemble", unseen=True)
class Ensemble(nn.Module):
    """The mean of five FFNs on the same tokens: constant weights, no router."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([member(x) for member in self.members]).mean(0)


@case("not_moe.top_k_filter", expect="left alone", unseen=True)
class TopKFilter(nn.Module):
    """top-k over features (a sparse autoencoder), not over experts."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(16, 64)
        self.decode = nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.encode(x)
        top, ids = h.topk(8, dim=-1)
        out: Tensor = self.decode(torch.zeros_like(h).scatter(-1, ids, top.relu()))
        return out


@case("not_moe.embedding_of_matrices", unseen=True, expect="left alone")
class BilinearTable(nn.Module):
    """A table of matrices indexed by a nearest-neighbour search; each is applied once, without an activation."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.empty(8, 16))
        self.maps = nn.Parameter(torch.empty(8, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 16)
        nearest = torch.cdist(flat, self.codes).nan_to_num().argmin(-1)
        return torch.bmm(self.maps[nearest], flat[..., None]).view_as(x)


@case("not_moe.attention", expect="left alone", unseen=True)
class Attention(nn.Module):
    """Self-attention with an FFN-like pair of projections round it."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.proj = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v))
        return out
