"""From the experts that ran, the weights of all: each expert's view is that expert's matrix, or the layout is refused.

E experts, D width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moec.frontends.torch.banks import Bank, unify
from moec.frontends.torch.instances import NotLifted, find_instances
from moec.frontends.torch.linears import LinearFinder
from moec.frontends.torch.recorder import record
from tests.frontend_units.build import params_of, rand, read

E, D, WIDE = 4, 3, 5
Weights = Callable[[Any, int], tuple[Tensor, Tensor]]


class Experts(nn.Module):
    """Runs the chosen experts one after the other; `weights(self, e)` are up [F, D] and down [D, F]."""

    def __init__(self, weights: Weights, chosen: Sequence[int], **parts: Any) -> None:
        super().__init__()
        self.__dict__["weights"], self.chosen = weights, chosen
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if type(part) is Tensor else part)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in self.chosen:
            up, down = self.__dict__["weights"](self, e)
            out = out + F.linear(F.silu(F.linear(x, up)), down)
        return out


def banks_of(module: nn.Module, path: str = "") -> dict[str, Bank]:
    log = record(module, (rand(2, D),), {}, path=path)
    prefix = f"{path}." if path else ""
    params = {prefix + name: p for name, p in params_of(module).items()}
    linears = LinearFinder(log, params, lambda name: True).find(0, len(log.entries))
    return {bank.role: bank for bank in unify(log, module, path, find_instances(log, linears), params)}


def pair(e: int) -> nn.Module:
    torch.manual_seed(e)
    return nn.ModuleDict({"up": nn.Linear(D, WIDE, bias=False), "down": nn.Linear(WIDE, D, bias=False)})


def of_modules(m: Any, e: int) -> tuple[Tensor, Tensor]:
    experts: Any = m.experts
    expert: Any = experts[e] if isinstance(experts, nn.ModuleList) else experts[f"expert {e}"]
    return expert["up"].weight, expert["down"].weight


def of_attributes(m: Any, e: int) -> tuple[Tensor, Tensor]:
    expert: Any = getattr(m, f"expert_{e}")
    return expert["up"].weight, expert["down"].weight


LAYOUTS: dict[str, tuple[Weights, Callable[[], dict[str, Any]]]] = {
    "stacked": (
        lambda m, e: (m.up[e], m.down[e]),
        lambda: {"up": rand(E, WIDE, D), "down": rand(E, D, WIDE, seed=1)},
    ),
    "stacked transposed": (
        lambda m, e: (m.up[e].t(), m.down[e].t()),
        lambda: {"up": rand(E, D, WIDE), "down": rand(E, WIDE, D, seed=1)},
    ),
    "stacked with strides of its own": (
        lambda m, e: (m.up[e], m.down[e]),
        lambda: {"up": rand(E, D, WIDE).transpose(1, 2), "down": rand(E, D, WIDE, seed=1)},
    ),
    "flat packs": (
        lambda m, e: (m.up.view(E, WIDE, D)[e], m.down.view(E, WIDE, D)[e].t()),
        lambda: {"up": rand(E * WIDE, D), "down": rand(E * WIDE, D, seed=1)},
    ),
    "flat packs in slices": (
        lambda m, e: (m.up[e * WIDE : (e + 1) * WIDE], m.down[e * WIDE : (e + 1) * WIDE].t()),
        lambda: {"up": rand(E * WIDE, D), "down": rand(E * WIDE, D, seed=1)},
    ),
    "module list": (of_modules, lambda: {"experts": nn.ModuleList(pair(e) for e in range(E))}),
    "module dict": (of_modules, lambda: {"experts": nn.ModuleDict({f"expert {e}": pair(e) for e in range(E)})}),
    "numbered attributes": (of_attributes, lambda: {f"expert_{e}": pair(e) for e in range(E)}),
    "parameter lists": (
        lambda m, e: (m.ups[e], m.downs[e]),
        lambda: {
            "ups": nn.ParameterList([rand(WIDE, D, seed=e) for e in range(E)]),
            "downs": nn.ParameterList([rand(D, WIDE, seed=9 + e) for e in range(E)]),
        },
    ),
    "stacked up, listed down": (
        lambda m, e: (m.up[e], m.downs[e].weight),
        lambda: {"up": rand(E, WIDE, D), "downs": nn.ModuleList(nn.Linear(WIDE, D, bias=False) for _ in range(E))},
    ),
}


@pytest.mark.parametrize("chosen", [(0, 1, 2, 3), (2, 0), (3, 1)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_experts_are_found_from_those_that_ran(layout: str, chosen: tuple[int, ...]) -> None:
    weights, parts = LAYOUTS[layout]
    module = Experts(weights, chosen, **parts())
    banks = banks_of(module)
    assert sorted(banks) == ["w_down", "w_up0"]
    params = params_of(module)
    ups, downs = read(params, banks["w_up0"].views), read(params, banks["w_down"].views)
    assert len(ups) == len(downs) == E
    for e in range(E):
        up, down = weights(module, e)
        assert torch.equal(ups[e], up)
        assert torch.equal(downs[e], down)


def test_names_are_the_models() -> None:
    weights, parts = LAYOUTS["module list"]
    banks = banks_of(Experts(weights, (0, 2), **parts()), path="layers.1.moe")
    assert [v.param for v in banks["w_up0"].views] == [f"layers.1.moe.experts.{e}.up.weight" for e in range(E)]


def test_biases_have_banks_of_their_own() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.bias = nn.Parameter(rand(E, WIDE, D)), nn.Parameter(rand(E, WIDE))
            self.down = nn.Parameter(rand(E, D, WIDE))

        def forward(self, x: Tensor) -> Tensor:
            return sum(
                (F.linear(F.relu(F.linear(x, self.up[e], self.bias[e])), self.down[e]) for e in (0, 3)), torch.zeros(())
            )

    module = Biased()
    banks = banks_of(module)
    assert torch.equal(torch.stack(read(params_of(module), banks["b_up0"].views)), module.bias)


def uneven(sizes: Sequence[int]) -> nn.ModuleList:
    return nn.ModuleList(
        nn.ModuleDict({"up": nn.Linear(D, n, bias=False), "down": nn.Linear(n, D, bias=False)}) for n in sizes
    )


def sharing() -> nn.ModuleList:
    experts = nn.ModuleList(pair(e) for e in range(E))
    experts[3] = experts[1]
    return experts


def test_mixed_widths_are_refused_by_name() -> None:
    """Also when the odd one did not run."""
    with pytest.raises(NotLifted, match=r"differ in width: 'experts.3.up.weight' is \(7, 3\)"):
        banks_of(Experts(of_modules, (0, 1), experts=uneven((WIDE, WIDE, WIDE, 7))))


def test_shared_experts_are_refused() -> None:
    with pytest.raises(NotLifted, match="share their parameters"):
        banks_of(Experts(of_modules, (0, 1), experts=sharing()))


def test_one_expert_is_no_mixture() -> None:
    with pytest.raises(NotLifted, match="only one expert's weights"):
        banks_of(Experts(of_modules, (2,), experts=nn.ModuleList(pair(e) for e in range(E))))


def test_experts_in_different_places_are_refused() -> None:
    def scattered(m: Any, e: int) -> tuple[Tensor, Tensor]:
        expert = m.first.inner if e == 0 else m.second.other
        return expert["up"].weight, expert["down"].weight

    first, second = nn.Module(), nn.Module()
    first.inner, second.other = pair(0), pair(1)
    with pytest.raises(NotLifted, match="are not siblings"):
        banks_of(Experts(scattered, (0, 1), first=first, second=second))


def test_an_expert_of_mixed_places_is_refused() -> None:
    def crossed(m: Any, e: int) -> tuple[Tensor, Tensor]:
        return m.up[e], m.down[(e + 1) % E]

    with pytest.raises(NotLifted, match="from several places of the stacks"):
        banks_of(Experts(crossed, (0, 1), up=rand(E, WIDE, D), down=rand(E, D, WIDE)))


def test_places_that_one_stack_lacks_are_no_experts() -> None:
    parts = {"up": rand(6, WIDE, D), "down": rand(E, D, WIDE)}
    banks = banks_of(Experts(lambda m, e: (m.up[e], m.down[e]), (0, 1), **parts))
    assert {len(bank.views) for bank in banks.values()} == {E}
    with pytest.raises(NotLifted, match="from several places of the stacks"):
        banks_of(Experts(lambda m, e: (m.up[e + 4], m.down[e]), (0, 1), **parts))


def test_a_pack_that_does_not_divide_is_refused() -> None:
    def sliced(m: Any, e: int) -> tuple[Tensor, Tensor]:
        return m.up[e * WIDE : (e + 1) * WIDE], m.down[e]

    with pytest.raises(NotLifted, match=r"'up' of shape .* is not an even stack"):
        banks_of(Experts(sliced, (0, 1), up=rand(E * WIDE + 2, D), down=rand(E, D, WIDE)))


def test_experts_with_different_operations_are_refused() -> None:
    class Odd(Experts):
        def forward(self, x: Tensor) -> Tensor:
            one, two = (F.linear(x, self.up[e]) for e in (0, 1))  # type: ignore[index]
            return F.linear(one.relu(), self.down[0]) + F.linear(two.tanh(), self.down[1])  # type: ignore[index]

    with pytest.raises(NotLifted, match="'up' from element 0 and 'up' from element 15 go through different operations"):
        banks_of(Odd(lambda m, e: (m, m), (), up=rand(E, WIDE, D), down=rand(E, D, WIDE)))
