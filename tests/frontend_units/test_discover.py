"""Candidates by geometry: shapes of experts or of an FFN are looked at, attention and stacks of layers are not.

E experts, D width, F hidden width.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from moec.frontends.torch.discover import discover_ffn, discover_moe, is_widening

D, WIDE, E = 8, 20, 4


class Part(nn.Module):
    """A module of parts; a list of ints is a parameter's shape."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(torch.zeros(part)) if isinstance(part, list) else part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def ffn(width: int = WIDE) -> nn.Module:
    return Part(up=nn.Linear(D, width), down=nn.Linear(width, D))


def attention() -> nn.Module:
    return Part(q=nn.Linear(D, D), k=nn.Linear(D, D), v=nn.Linear(D, D), o=nn.Linear(D, D))


def moes(model: nn.Module) -> dict[str, set[str]]:
    return {c.name: c.weights for c in discover_moe(model)}


def ffns(model: nn.Module) -> dict[str, set[str]]:
    taken = set().union(*moes(model).values())
    return {c.name: c.weights for c in discover_ffn(model, taken)}


def test_stacked_parameters() -> None:
    model = Part(mlp=Part(gate=[E, D], experts=Part(up=[E, WIDE, D], down=[E, D, WIDE], bias=[E, WIDE])))
    assert moes(model) == {"mlp.experts": {"mlp.experts.up", "mlp.experts.down"}}


def test_a_stack_of_another_number_is_not_the_experts() -> None:
    model = Part(experts=Part(up=[E, WIDE, D], down=[E, D, WIDE], heads=[3, D, D]))
    assert moes(model) == {"experts": {"experts.up", "experts.down"}}


def test_a_list_of_modules_belongs_to_the_module_that_holds_it() -> None:
    model = Part(mlp=Part(router=nn.Linear(D, E), experts=nn.ModuleList(ffn() for _ in range(E))))
    weights = {f"mlp.experts.{e}.{n}.weight" for e in range(E) for n in ("up", "down")}
    assert moes(model) == {"mlp": weights}


def test_a_list_with_a_forward_of_its_own_is_a_module() -> None:
    class Experts(nn.ModuleList):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    assert list(moes(Part(mlp=Part(experts=Experts(ffn() for _ in range(E)))))) == ["mlp.experts"]


@pytest.mark.parametrize(
    "style", ["dict", "dict with a dropout", "numbered", "parameters", "experts of different widths"]
)
def test_other_ways_to_list_experts(style: str) -> None:
    experts: dict[str, Any] = {
        "dict": {"experts": nn.ModuleDict({f"e{e}": ffn() for e in range(E)})},
        "dict with a dropout": {
            "experts": nn.ModuleDict({**{f"e{e}": ffn() for e in range(E)}, "dropout": nn.Dropout(0.2)})
        },
        "numbered": {f"expert_{e}": ffn() for e in range(E)},
        "parameters": {
            "ups": nn.ParameterList([torch.zeros(WIDE, D) for _ in range(E)]),
            "downs": nn.ParameterList([torch.zeros(D, WIDE) for _ in range(E)]),
        },
        "experts of different widths": {"experts": nn.ModuleList(ffn(WIDE + e) for e in range(E))},
    }
    ((name, weights),) = moes(Part(mlp=Part(**experts[style]))).items()
    assert name == "mlp"
    assert len(weights) == 2 * E


def test_flat_packs() -> None:
    assert moes(Part(mlp=Part(w1=[E * WIDE, D], w2=[E * WIDE, D]))) == {"mlp": {"mlp.w1", "mlp.w2"}}


def test_a_stack_of_layers_is_no_mixture() -> None:
    layers = nn.ModuleList(Part(attention=attention(), mlp=ffn()) for _ in range(3))
    assert moes(Part(layers=layers)) == {}


def test_layers_that_hold_experts_are_no_mixture_themselves() -> None:
    layers = nn.ModuleList(Part(experts=Part(up=[E, WIDE, D], down=[E, D, WIDE])) for _ in range(3))
    assert list(moes(Part(layers=layers))) == [f"layers.{i}.experts" for i in range(3)]


def test_one_expert_is_no_list() -> None:
    assert moes(Part(experts=nn.ModuleList([ffn()]))) == {}


def test_convolutions_and_attention_are_not_candidates() -> None:
    assert moes(Part(conv=nn.Conv1d(D, D, 3), attention=nn.MultiheadAttention(D, 2))) == {}


def test_an_ffn_is_the_smallest_module_with_a_pair() -> None:
    model = Part(layers=nn.ModuleList(Part(attention=attention(), mlp=ffn()) for _ in range(2)))
    assert list(ffns(model)) == ["layers.0.mlp", "layers.1.mlp"]


def test_attention_is_no_ffn() -> None:
    assert "attention" not in ffns(Part(attention=attention(), mlp=ffn()))


def test_gate_and_up_in_one_matrix() -> None:
    assert list(ffns(Part(mlp=Part(gate_up=nn.Linear(D, 2 * WIDE), down=nn.Linear(WIDE, D))))) == ["mlp"]


def test_an_ffn_written_into_the_layer() -> None:
    layer = Part(attention=attention(), intermediate=Part(dense=nn.Linear(D, WIDE)), output=nn.Linear(WIDE, D))
    assert list(ffns(Part(layer=layer))) == ["layer"]


def test_square_ffns_count_where_nothing_else_does() -> None:
    square = Part(up=nn.Linear(D, D), down=nn.Linear(D, D))
    assert list(ffns(Part(mlp=square))) == ["mlp"]


def test_experts_are_not_ffns_too() -> None:
    model = Part(mlp=Part(router=nn.Linear(D, E), experts=nn.ModuleList(ffn() for _ in range(E)), shared=ffn()))
    assert list(ffns(model)) == ["mlp.shared"]


def test_candidates_come_in_the_order_of_the_model() -> None:
    model = Part(b=Part(experts=nn.ModuleList(ffn() for _ in range(2))), a=Part(up=[2, WIDE, D], down=[2, D, WIDE]))
    assert list(moes(model)) == ["b", "a"]


def test_a_pair_that_narrows_is_less_of_an_ffn() -> None:
    assert is_widening([torch.zeros(WIDE, D), torch.zeros(D, WIDE)])
    assert is_widening([torch.zeros(2 * WIDE, D), torch.zeros(D, WIDE)])
    assert not is_widening([torch.zeros(2, D), torch.zeros(D, D)])
