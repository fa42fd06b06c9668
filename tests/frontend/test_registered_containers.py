"""Objects that a library has registered with torch's pytree: they stay whole, as before they were registered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree

import moec
from moec.trees import tree_flatten, tree_map, tree_unflatten

DIM = 32


class Store:
    """What layers hand on to each other, such as keys and values; it holds tensors and nothing else."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def add(self, x: Tensor) -> Tensor:
        assert x.dtype.is_floating_point, "something else than a tensor was put into the store"
        self.seen.append(x)
        return torch.stack(self.seen).mean(0)


def _again(tensors: Any, context: Any) -> Store:
    made = Store()
    for tensor in tensors:
        made.add(tensor)
    return made


@pytest.fixture
def registered() -> Iterator[None]:
    _pytree.register_pytree_node(Store, lambda store: (store.seen, None), _again)
    yield
    _pytree._deregister_pytree_node(Store)


class MoE(nn.Module):
    """x[B, S, D] -> [B, S, D], with what the store holds."""

    def __init__(self, experts: int = 4, k: int = 2) -> None:
        super().__init__()
        self.k = k
        self.gate = nn.Linear(DIM, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(DIM, 24), nn.GELU(), nn.Linear(24, DIM)) for _ in range(experts)
        )

    def forward(self, x: Tensor, store: Store | None = None) -> Tensor:
        rows = x.reshape(-1, DIM)
        weights, ids = self.gate(rows).softmax(-1).topk(self.k)
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out = out.index_add(0, token, weights[token, slot, None] * expert(rows[token]))
        out = out.view_as(x)
        return out if store is None else out + store.add(out)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MoE() for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Store]:
        store = Store()
        for layer in self.layers:
            store.add(x)
            x = layer(x)
        return x, store


@pytest.mark.usefixtures("registered")
def test_a_model_that_returns_one() -> None:
    torch.manual_seed(0)
    model = Model().eval()
    fast = moec.compile(model, example_inputs=(torch.randn(2, 5, DIM),), strict=True)
    assert fast.moec.report.whole_model_error < 2e-6
    x = torch.randn(3, 7, DIM)
    with torch.no_grad():
        (mine, held), (theirs, wanted) = fast(x), model(x)
    assert torch.allclose(mine, theirs, atol=1e-6)
    assert isinstance(held, Store)
    assert [torch.allclose(a, b, atol=1e-6) for a, b in zip(held.seen, wanted.seen, strict=True)] == [True, True]


@pytest.mark.usefixtures("registered")
def test_they_are_leaves() -> None:
    store = Store()
    store.add(torch.ones(2))
    leaves, spec = tree_flatten({"a": (1, [store]), "b": None})
    assert leaves == [1, store, None]
    assert tree_unflatten(leaves, spec)["a"][1][0] is store
    assert tree_map(lambda leaf: leaf is store, [store, 3]) == [True, False]
    assert tree_map(type, {"a": (1, 2)}, is_leaf=lambda value: isinstance(value, tuple)) == {"a": tuple}
