"""Tensors of one expert are read together, and everything that may happen to them is seen as it is one by one.

E experts, D model width, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from moec.errors import MoecError
from moec.weights import View, WeightStore, read_together

E, D, F = 3, 4, 6
NAMES = ("up", "bias", "down")
Act = Callable[[Any], Any]


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, F), nn.Linear(F, D, bias=False)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"experts": nn.ModuleList(Expert() for _ in range(E))})


def store_of(module: nn.Module) -> WeightStore:
    def views(path: str, *shape: int) -> tuple[View, ...]:
        stride = (shape[1], 1) if len(shape) == 2 else (1,)
        return tuple(View(f"experts.{e}.{path}", 0, shape, stride) for e in range(E))

    return WeightStore(
        module, {"up": views("up.weight", F, D), "bias": views("up.bias", F), "down": views("down.weight", D, F)}
    )


def one(module: Any) -> Any:
    """The expert that things happen to."""
    return module["experts"][1]


def double(module: Any) -> None:
    with torch.no_grad():
        one(module).up.weight.mul_(2)


def exchange_memory(module: Any) -> None:
    one(module).down.weight.data = torch.ones(D, F)


SEEN: dict[str, Act] = {
    "written in place": double,
    "written through data": lambda m: one(m).up.bias.data.add_(1),
    "other memory": exchange_memory,
    "another parameter": lambda m: setattr(one(m).down, "weight", nn.Parameter(torch.zeros(D, F))),
    "loaded": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}, assign=True),
    "cast": lambda m: m.to(torch.bfloat16),
    "a dict of parameters of its own": lambda m: setattr(
        one(m).down, "_parameters", {"weight": nn.Parameter(torch.zeros(D, F)), "bias": None}
    ),
}


@pytest.mark.parametrize("how", SEEN)
def test_the_tensors_of_now_are_read(how: str) -> None:
    module = model()
    store = store_of(module)
    store.read(NAMES, range(E))
    SEEN[how](module)
    for row, expert in zip(store.read(NAMES, (2, 1, 0)), reversed(module["experts"]), strict=True):  # type: ignore[index]
        for mine, theirs in zip(row, (expert.up.weight, expert.up.bias, expert.down.weight), strict=True):
            assert mine is theirs


def other_strides(module: Any) -> None:
    one(module).up.weight.data = torch.ones(D, F).t()


GONE: dict[str, Act] = {
    "another shape": lambda m: setattr(one(m).up, "weight", nn.Parameter(torch.ones(F, D + 1))),
    "other strides": other_strides,
    "a parameter gone": lambda m: delattr(one(m).up, "weight"),
    "a bias gone": lambda m: setattr(one(m).up, "bias", None),
    "a bias that was not": lambda m: setattr(one(m).down, "bias", nn.Parameter(torch.ones(D))),
    "another module": lambda m: setattr(one(m), "down", nn.Linear(F, D, bias=False)),
    "another expert": lambda m: m["experts"].__setitem__(1, Expert()),
    "one expert more": lambda m: m["experts"].append(Expert()),
    "a forward of its own": lambda m: setattr(one(m), "forward", one(m).forward),
}


@pytest.mark.parametrize("how", GONE)
def test_what_is_not_as_it_was_is_an_error(how: str) -> None:
    module = model()
    store = store_of(module)
    store.read(NAMES, range(E))
    GONE[how](module)
    if how != "one expert more":
        assert len(store.read(NAMES, (0, 2))) == 2, "experts that nothing happened to are served"
    with pytest.raises(MoecError) as together:
        store.read(NAMES, (1,))
    with pytest.raises(MoecError) as alone:
        [store.experts(name)[1] for name in NAMES]
    assert together.value.code == alone.value.code == "MOEC230"
    assert together.value.message == alone.value.message


def test_what_is_watched_is_asked_for_the_experts_that_are_read() -> None:
    store = store_of(model())
    asked: list[int] = []
    store.watch({f"experts.{e}.up.weight": lambda e=e: asked.append(e) for e in range(E)})  # type: ignore[misc]
    store.read(NAMES, (2, 0))
    assert asked == [2, 0]
    store.watch({})
    store.read(NAMES, (1,))
    assert asked == [2, 0], "another watch takes the place of the first"


def test_parts_of_parameters_and_buffers_are_read_too() -> None:
    module = model()
    half = tuple(View(f"experts.{e}.up.weight", D, (F - 1, D), (D, 1)) for e in range(E))
    store = WeightStore(module, {"half": half})
    assert torch.equal(store.read(("half",), (1,))[0][0], one(module).up.weight[1:])
    whole = store_of(module)
    kept = one(module).up.weight.detach()
    del one(module).up.weight
    one(module).up.register_buffer("weight", kept)
    assert whole.read(NAMES, (1,))[0][0] is kept


def test_only_lists_of_one_store_are_read_together() -> None:
    module = model()
    mine, other = store_of(module), store_of(module)
    assert read_together([mine.experts("up"), mine.experts("down")], (0,)) is not None
    assert read_together([mine.experts("up"), other.experts("down")], (0,)) is None
    assert read_together([mine.experts("up"), [torch.ones(1)]], (0,)) is None


def test_stand_ins_are_read_from_what_is_given() -> None:
    module = model()
    store = store_of(module)
    store.read(NAMES, range(E))
    given = {name: torch.full_like(parameter, 7) for name, parameter in module.named_parameters()}
    for tensor in store.standing_in(given).read(NAMES, (1,))[0]:
        assert bool((tensor == 7).all())
