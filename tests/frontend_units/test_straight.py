"""Steps written out as a function: every kind of argument and result, and what is looked up on each call."""

from __future__ import annotations

from collections import OrderedDict
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.errors import MoecError
from moec.frontends.torch.oplog import Ref
from moec.frontends.torch.program import Live, Step
from moec.frontends.torch.sizes import Size
from moec.frontends.torch.straight import used_by, write_out

X = torch.arange(6.0).view(2, 3)


def step(op: Any, *args: Any, outs: tuple[int | None, ...] = (9,), path: str | None = None, **kwargs: Any) -> Step:
    return Step(op, path, (args, kwargs), outs, "step")


@pytest.mark.parametrize(
    "value",
    [1, -1, True, None, 1.5, float("inf"), "a 'word'", torch.float32, [1, (2, [3])], {"a": 1, 2: "b"}, (), slice(1, 2)],
    ids=str,
)
def test_arguments_arrive_as_they_were(value: Any) -> None:
    seen: list[Any] = []

    def op(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.extend([args, kwargs])
        return X

    write_out([step(op, value, **{"from": value})], (0,), Ref(9))(None, X.shape, X)
    assert seen == [(value,), {"from": value}]
    assert type(seen[0][0]) is type(value)


def test_other_containers_are_built_anew() -> None:
    tree = OrderedDict(b=Ref(0), a=[Size((0,), Fraction(1), 0)])
    given = write_out([], (0,), tree)(None, X.shape, X)
    assert type(given) is OrderedDict
    assert list(given.items()) == [("b", X), ("a", [2])]


def test_sizes_are_those_of_the_call() -> None:
    sizes = [
        Size((1,), Fraction(1), 0),
        Size((0, 1), Fraction(1), 0),
        Size((1,), Fraction(2), 0),
        Size((0,), Fraction(1), -1),
    ]
    assert write_out([], (0,), sizes)(None, (5, 7), X) == [7, 35, 14, 4]


def test_results_of_several_tensors() -> None:
    steps = [
        step(torch.topk, Ref(0), 2, outs=(1, 2)),
        step(torch.split, Ref(0), 1, outs=(3, None)),
        step(lambda x: (x, [x + 1]), Ref(3), outs=(4, 5)),
        step(lambda x: (x + 2,), Ref(5), outs=(6,)),
    ]
    values, index, first, second, last = write_out(steps, (0,), [Ref(s) for s in (1, 2, 4, 5, 6)])(None, X.shape, X)
    assert torch.equal(values, X.topk(2).values)
    assert torch.equal(index, X.topk(2).indices)
    assert torch.equal(first, X[:1])
    assert torch.equal(second, X[:1] + 1)
    assert torch.equal(last, X[:1] + 3)


def test_a_result_of_another_number_of_tensors_is_an_error() -> None:
    with pytest.raises(ValueError, match="unpack"):
        write_out([step(torch.split, Ref(0), 1, outs=(1,))], (0,), Ref(1))(None, X.shape, X)


def test_submodules_and_parameters_are_those_of_now() -> None:
    module = nn.ModuleDict({"router": nn.Linear(3, 3), "list": nn.ModuleList([nn.Identity(), nn.Linear(3, 3)])})
    live = Live("router.bias", 1, (2,), (1,), (3,), (1,))
    steps = [step(None, Ref(0), outs=(1,), path="router"), step(None, Ref(1), outs=(2,), path="list.1")]
    function = write_out(steps, (0,), (Ref(2), live))
    for _ in range(2):
        result, part = function(module, X.shape, X)
        assert torch.equal(result, module["list"][1](module["router"](X)))  # type: ignore[index]
        assert torch.equal(part, module["router"].bias[1:])  # type: ignore[index]
        module["router"] = nn.Linear(3, 3)
    module["router"].bias = nn.Parameter(torch.ones(4))
    with pytest.raises(MoecError, match=r"'router\.bias' has another layout"):
        write_out([], (0,), live)(module, X.shape, X)


def test_a_slot_may_be_handed_back_as_another_tensor() -> None:
    function = write_out([step(torch.neg, Ref(0), outs=(1,))], (0,), (Ref(0), Ref(1)), anew=0)
    given = X.t()
    back, made = function(None, X.shape, X, given)
    assert back is given
    assert torch.equal(made, -X)


def test_what_steps_need_from_before() -> None:
    steps = [step(torch.add, Ref(1), Ref(2), outs=(3,)), step(torch.add, Ref(3), Ref(4), outs=(2,))]
    assert used_by(steps, (Ref(2), Ref(5))) == {1, 2, 4, 5}


class KeywordFfn(nn.Module):
    """Submodules whose names Python code cannot say after a dot."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("in", nn.Linear(8, 12))
        self.add_module("not", nn.Linear(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = getattr(self, "not")(torch.relu(getattr(self, "in")(x)))
        return y


class KeywordMixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts: Any = nn.ModuleDict({"class": nn.Linear(8, 4, bias=False)})
        self.experts = nn.ModuleList(KeywordFfn() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.parts["class"](x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


@pytest.mark.parametrize("kind", [KeywordFfn, KeywordMixture])
def test_submodules_may_be_named_by_keywords(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    fast = moec.compile(model, example_inputs=(torch.randn(6, 8),), strict=True)
    x = torch.randn(9, 8)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)
    assert not any(layer.fallbacks for layer in fast.moec.report.layers)
