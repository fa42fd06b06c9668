"""Models that choose the best of something and hold matrices, and are no mixtures. T tokens, V words, N entries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Attends(nn.Module):
    """Each token reads the two tokens it is most like, then a dense FFN: x[T, 16] -> [T, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, best = (x @ x.T).topk(2, -1)
        mixed = (x[best] * weights.softmax(-1).unsqueeze(-1)).sum(1)
        y: torch.Tensor = self.down(torch.relu(self.up(mixed)))
        return y


class AttendsSparsely(nn.Module):
    """Attention that keeps each query's three best scores and masks all others: x[T, 16] -> [T, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.q(x) @ self.k(x).T
        least = scores.topk(3, -1).values[:, -1:]
        y: torch.Tensor = self.out(scores.masked_fill(scores < least, -1e9).softmax(-1) @ self.v(x))
        return y


class AttendsHard(nn.Module):
    """Attention to the one best token: x[T, 16] -> [T, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.out = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        best = (self.q(x) @ x.T).argmax(-1)
        y: torch.Tensor = x + self.out(torch.relu(self.v(x)[best]))
        return y


class Classifies(nn.Module):
    """An ArgMax at the end: x[T, 16] -> the best of 24 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.relu(self.up(x))).argmax(-1)
        return y


class Samples(nn.Module):
    """The five best words and their chances: x[T, 16] -> [T, 5] twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 50)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        best, words = self.head(x + self.down(torch.relu(self.up(x)))).topk(5, -1)
        return best.softmax(-1), words


class LooksUp(nn.Module):
    """The nearest entries of a table of keys and values, two layers of it: x[T, 16] -> [T, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.randn(40, 16))
        self.values, self.more = nn.Parameter(torch.randn(40, 16)), nn.Parameter(torch.randn(40, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        best, at = (x @ self.keys.T).topk(3, -1)
        weights = best.softmax(-1).unsqueeze(-1)
        return (self.values[at] * weights).sum(1) + torch.relu((self.more[at] * weights).sum(1))


class Beams(nn.Module):
    """A step of a beam search: the best of all beams' words, then an FFN over their states: h[T, 16] -> [3, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.words = nn.Linear(16, 50), nn.Embedding(50, 16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        best, at = self.head(h).log_softmax(-1).flatten().topk(3)
        beam, word = at // 50, at % 50
        following = h[beam] + self.words(word)
        return following + self.down(F.silu(self.up(following))), word, best


class Invited(nn.Module):
    """Experts choose their tokens, not tokens their experts: x[T, 16] -> [T, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 5, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(5, 16, 24) / 4), nn.Parameter(torch.randn(5, 24, 16) / 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, tokens = self.gate(x).softmax(-1).T.topk(4, -1)
        y = torch.bmm(torch.relu(torch.bmm(x[tokens], self.up)), self.down) * weights.unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, tokens.flatten(), y.flatten(0, 1))


class Normed(nn.Module):
    """Two experts a token, and a norm over both of their results in the middle: x[T, 16] -> [T, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 5, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(5, 16, 24) / 4), nn.Parameter(torch.randn(5, 24, 16) / 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2, -1)
        h = torch.relu(x[:, None, None] @ self.up[chosen])
        h = h / h.square().sum((1, 2, 3), keepdim=True).sqrt()
        y: torch.Tensor = ((h @ self.down[chosen]).squeeze(2) * weights.unsqueeze(-1)).sum(1)
        return y
