"""Router logits that crowd experts, in every way in which readings of a capacity differ.

B sequences, S positions, E experts. All are f32[B, S, E].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moec.frontends.torch.capacitysize import Capacity


def noise(batch: int, length: int, experts: int, seed: int) -> torch.Tensor:
    """Choices at random."""
    return torch.randn(batch, length, experts, generator=torch.Generator().manual_seed(seed))


def skewed(length: int, experts: int) -> torch.Tensor:
    """[1, S, E]: every token wants expert 0 most, and then one of the others."""
    logits = noise(1, length, experts, seed=length)
    logits[..., 0] += 8
    return logits


def crowds(experts: int, capacity: Capacity, *, by_sequence: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Labelled logits [B, S, E] that crowd experts in every way in which readings differ."""
    sizes = (
        ((1, 1), (1, 5), (2, 12), (3, 7), (1, 33), (2, 40))
        if by_sequence
        else tuple((1, n) for n in (1, 5, 24, 33, 80))
    )
    for i, (batch, length) in enumerate(sizes):
        random = noise(batch, length, experts, seed=50 + i)
        place = torch.arange(length)
        yield "random choices", 2.0 * random
        rising = random.clone()
        rising[..., 0] += 4 + 3 * place / length
        yield "one expert chosen by all, later tokens surer", rising
        rivals = random.clone()
        rivals[..., 0] += 6 + 3 * (place % 2)
        rivals[..., 1] += 9 - 3 * (place % 2)
        yield "two experts chosen by all, first by every other token", rivals
        boundary = random.clone()
        room = capacity.at(length if i % 2 else batch * length)
        at = torch.arange(batch * length).reshape(batch, length)
        boundary[..., 0] += torch.where(at <= room, 9.0, -9.0)
        yield "one token more than there are places", boundary
        exact = random.clone()
        exact[..., 0] += torch.where(at < room, 9.0, -9.0)
        yield "as many tokens as there are places", exact
        alike = random[:1, :1].expand(batch, length, experts).clone()
        yield "all tokens alike", alike
        uneven = random.clone()
        uneven[0, :, 0] += 8
        yield "one sequence all to one expert", uneven
        sure = 0.1 * random
        sure[..., 0] += 18 + place % 5
        yield "one expert chosen by all, the others hardly", sure
    yield "ties", torch.zeros(1, 24, experts)
    yield "ties", noise(1, 24, experts, seed=9).round()
