"""A weight store reads the user's parameters anew each time, copies nothing, and says when they are gone.

E experts, N outputs, C inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moec.errors import MoecError
from moec.weights import View, WeightStore
from tests.frontend_units.build import rand

E, N, C = 4, 3, 5
Views = dict[str, View | tuple[View, ...]]


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(rand(E, N, C))
        self.transposed = nn.Parameter(rand(E, C, N))
        self.pack = nn.Parameter(rand(E * N, C))
        self.bias = nn.Parameter(rand(E, N))
        self.experts = nn.ModuleList(nn.Linear(C, N) for _ in range(E))
        self.dense = nn.Linear(C, N)
        self.register_buffer("fixed", rand(N, C))


VIEWS: Views = {
    "stack": tuple(View("stack", e * N * C, (N, C), (C, 1)) for e in range(E)),
    "transposed": tuple(View("transposed", e * N * C, (N, C), (1, N)) for e in range(E)),
    "pack": tuple(View("pack", e * N * C, (N, C), (C, 1)) for e in range(E)),
    "bias": tuple(View("bias", e * N, (N,), (1,)) for e in range(E)),
    "experts": tuple(View(f"experts.{e}.weight", 0, (N, C), (C, 1)) for e in range(E)),
    "reversed": tuple(View("stack", (E - 1 - e) * N * C, (N, C), (C, 1)) for e in range(E)),
    "uneven": tuple(View("stack", e * N * C, (N, C), (C, 1)) for e in (0, 1, 3)),
    "dense": View("dense.weight", 0, (N, C), (C, 1)),
    "half": View("dense.weight", 1, (N, 2), (C, 2)),
    "fixed": View("fixed", 0, (N, C), (C, 1)),
}


def expected(module: Weights, name: str) -> list[Tensor]:
    found: dict[str, Callable[[], list[Tensor]]] = {
        "stack": lambda: list(module.stack),
        "transposed": lambda: [w.t() for w in module.transposed],
        "pack": lambda: list(module.pack.view(E, N, C)),
        "bias": lambda: list(module.bias),
        "experts": lambda: [getattr(expert, "weight") for expert in module.experts],  # noqa: B009
        "reversed": lambda: list(module.stack.flip(0)),
        "uneven": lambda: [module.stack[e] for e in (0, 1, 3)],
    }
    return found[name]()


PER_EXPERT = [name for name, entry in VIEWS.items() if isinstance(entry, tuple)]


@pytest.mark.parametrize("name", PER_EXPERT)
def test_experts_are_views_of_the_parameters(name: str) -> None:
    module = Weights()
    experts = WeightStore(module, VIEWS).experts(name)
    wanted = expected(module, name)
    assert len(experts) == len(wanted)
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    for mine, theirs in zip(experts, wanted, strict=True):
        assert torch.equal(mine, theirs)
        assert mine.untyped_storage().data_ptr() in own


@pytest.mark.parametrize("name", PER_EXPERT)
def test_a_stack_only_where_experts_lie_evenly(name: str) -> None:
    module = Weights()
    stacked = WeightStore(module, VIEWS).stacked(name)
    if name in ("experts", "uneven", "reversed"):
        assert stacked is None
    else:
        assert stacked is not None
        assert torch.equal(stacked, torch.stack(expected(module, name)))
        assert stacked.untyped_storage().data_ptr() in {
            p.untyped_storage().data_ptr() for p in (module.stack, module.transposed, module.pack, module.bias)
        }


def test_dense_weights_and_buffers() -> None:
    module = Weights()
    store = WeightStore(module, VIEWS)
    assert store.dense("dense") is module.dense.weight
    assert torch.equal(store.dense("half"), module.dense.weight[:, 1::2])
    assert torch.equal(store.dense("fixed"), module.get_buffer("fixed"))
    with pytest.raises(MoecError, match="'stack' is per expert"):
        store.dense("stack")


def test_one_expert_is_a_stack_of_one() -> None:
    module = Weights()
    views: Views = {"one": (View("stack", N * C, (N, C), (C, 1)),)}
    stacked = WeightStore(module, views).stacked("one")
    assert stacked is not None
    assert torch.equal(stacked, module.stack[1:2])


def halve(module: Weights) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(0.5)


def replace(module: Weights) -> None:
    module.stack = nn.Parameter(rand(E, N, C, seed=9))
    module.experts[1].weight = nn.Parameter(rand(N, C, seed=9))


CHANGES: dict[str, Callable[[Weights], Any]] = {
    "written in place": halve,
    "loaded": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
    "loaded by assignment": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}, assign=True),
    "cast": lambda m: m.to(torch.float64),
    "replaced": replace,
}


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("name", ["stack", "experts", "transposed"])
def test_changes_are_seen_at_once(name: str, how: str) -> None:
    module = Weights()
    store = WeightStore(module, VIEWS)
    CHANGES[how](module)
    for mine, theirs in zip(store.experts(name), expected(module, name), strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("how", CHANGES)
def test_the_version_changes_with_them(how: str) -> None:
    module = Weights()
    store = WeightStore(module, VIEWS)
    before = store.version()
    assert store.version() == before
    CHANGES[how](module)
    assert store.version() != before


def test_writes_to_data_are_not_seen_by_the_version_but_are_read() -> None:
    module = Weights()
    store = WeightStore(module, VIEWS)
    before = store.version()
    module.stack.data.mul_(2)
    assert store.version() == before
    assert torch.equal(store.experts("stack")[1], module.stack[1])


def shrink(module: Weights) -> None:
    module.stack = nn.Parameter(rand(E, N, C - 1))


def restride(module: Weights) -> None:
    module.stack = nn.Parameter(rand(E, C, N).transpose(1, 2))


def remove(module: Weights) -> None:
    del module.stack


def swap_module(module: Weights) -> None:
    module.experts[2] = nn.Linear(C, N)


MOVED: dict[str, tuple[Callable[[Weights], Any], str, str]] = {
    "another shape": (shrink, "stack", r"changed from shape \(4, 3, 5\)"),
    "other strides": (restride, "stack", r"strides \(15, 5, 1\) to \(4, 3, 5\), \(15, 1, 3\)"),
    "gone": (remove, "stack", "'stack' is not in the module that was compiled"),
    "module replaced": (swap_module, "experts", "'experts.2.weight' is not in the module that was compiled"),
}


@pytest.mark.parametrize("how", MOVED)
def test_weights_that_are_not_where_they_were(how: str) -> None:
    act, name, message = MOVED[how]
    module = Weights()
    store = WeightStore(module, VIEWS)
    act(module)
    with pytest.raises(MoecError, match=message) as raised:
        [w.shape for w in store.experts(name)]
    assert raised.value.code == "MOEC230"
    assert raised.value.hint is not None
    assert "moec.refresh" in raised.value.hint


def move(module: Weights) -> None:
    weight = module.get_parameter("experts.2.weight")
    weight.data = weight.data.clone()


def replace_one(module: Weights) -> None:
    weight = module.get_parameter("experts.1.weight")
    module.get_submodule("experts.1").weight = nn.Parameter(weight.detach().clone())


@pytest.mark.parametrize("act", [move, replace_one, replace, lambda m: m.to(torch.float64)])
def test_placement_changes_when_memory_does(act: Callable[[Weights], Any]) -> None:
    module = Weights()
    store = WeightStore(module, VIEWS)
    before = store.placement()
    halve(module)
    assert store.placement() == before
    act(module)
    after = store.placement()
    assert after != before
    assert store.placement() == after


def add_expert(module: Weights) -> None:
    module.experts.append(nn.Linear(C, N, bias=False))


def wrap(module: Weights) -> None:
    expert = module.experts[0]
    expert.forward = expert.forward


@pytest.mark.parametrize("act", [shrink, restride, remove, swap_module, add_expert, wrap])
def test_placement_sees_what_reading_sees(act: Callable[[Weights], Any]) -> None:
    module = Weights()
    store = WeightStore(module, VIEWS)
    store.placement()
    act(module)
    for _ in range(2):
        with pytest.raises(MoecError) as raised:
            store.placement()
        assert raised.value.code == "MOEC230"


def test_only_experts_that_are_asked_for_are_read() -> None:
    """Listed experts: one that is broken is not touched when it is not hit."""
    module = Weights()
    experts = WeightStore(module, VIEWS).experts("experts")
    swap_module(module)
    assert experts[1] is getattr(module.experts[1], "weight")  # noqa: B009
    with pytest.raises(MoecError):
        experts[2]


def test_names_that_do_not_exist() -> None:
    with pytest.raises(MoecError, match=r"no weight 'nowhere\.weight'"):
        WeightStore(Weights(), {"x": View("nowhere.weight", 0, (N, C), (C, 1))})


def test_bytes_are_those_of_the_parameters() -> None:
    views: Views = {"a": VIEWS["stack"], "b": VIEWS["reversed"], "c": VIEWS["dense"]}
    store = WeightStore(Weights(), views)
    assert store.nbytes == 4 * (E * N * C + N * C)
    assert set(store.params) == {"stack", "dense.weight"}


def test_the_version_tells_apart_tensors_that_took_each_others_place() -> None:
    module = Weights()
    store = WeightStore(module, VIEWS)
    for _ in range(50):
        before = store.version()
        for seed in (1, 2):
            module.stack = nn.Parameter(rand(E, N, C, seed=seed))
        assert store.version() != before
