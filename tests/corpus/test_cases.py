"""The corpus checked on its own: cases run, decide among experts, and are what their docstrings say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.corpus import CASES, Case
from tests.corpus.case import random_tokens

COUNTS = (1, 2, 3, 5, 7, 33, 130)
SCALES = (0.05, 1.0, 8.0, 60.0)


def leaves(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def call(case: Case, module: nn.Module, tokens: Tensor) -> list[Tensor]:
    torch.manual_seed(11)
    with torch.no_grad():
        return leaves(module(*case.inputs(tokens)))


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


@pytest.fixture(params=list(CASES.values()), ids=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    assert isinstance(request.param, Case)
    return request.param


def test_runs_and_is_finite(case: Case) -> None:
    module = case.make()
    for count in COUNTS:
        for scale in SCALES:
            tokens = random_tokens(count, case.dim, scale=scale, seed=count)
            outputs = call(case, module, tokens)
            assert outputs
            assert all(torch.isfinite(leaf).all() for leaf in outputs if leaf.is_floating_point())


def test_is_the_same_every_time(case: Case) -> None:
    tokens = random_tokens(33, case.dim)
    one, two = (call(case, case.make(), tokens.clone()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_special_tokens_do_not_raise(case: Case) -> None:
    module = case.make()
    tokens = random_tokens(33, case.dim)
    tokens[5] = float("nan")
    assert call(case, module, tokens)
    assert call(case, module, torch.zeros(9, case.dim))


def expert_slices(module: nn.Module) -> list[list[Tensor]]:
    """Gradients by expert, for each list of modules and each 3-D parameter of at least two experts."""
    groups: list[list[Tensor]] = []
    for part in module.modules():
        if isinstance(part, (nn.ModuleList, nn.ModuleDict)) and len(part) > 1:
            members = part.values() if isinstance(part, nn.ModuleDict) else part
            weights = [next(member.parameters(), None) for member in members]
            groups.append([w.grad for w in weights if w is not None and w.grad is not None])
    for parameter in module.parameters():
        if parameter.dim() == 3 and parameter.grad is not None:
            groups.append(list(parameter.grad))
    return groups


def test_several_experts_take_part(case: Case) -> None:
    if case.kind != "moe" or case.name.endswith("effects.inner_no_grad"):
        pytest.skip("no experts, or no gradients to see them by")
    module = case.make()
    torch.manual_seed(3)
    outputs = leaves(module(*case.inputs(random_tokens(130, case.dim))))
    total = torch.stack([leaf.square().sum() for leaf in outputs if leaf.requires_grad]).sum()
    total.backward()
    hit = max((sum(bool(g.any()) for g in group) for group in expert_slices(module)), default=99)
    assert hit >= case.min_experts


WITH_DECOY = [case for case in CASES.values() if case.decoy is not None]


@pytest.mark.parametrize("case", WITH_DECOY, ids=[case.name for case in WITH_DECOY])
def test_a_careless_reading_would_be_wrong(case: Case) -> None:
    module = case.make()
    if case.perturb is not None:
        case.perturb(module)
    tokens = random_tokens(case.decoy_tokens, case.dim, scale=case.decoy_scale, seed=5)
    right = call(case, module, tokens)[0]
    assert case.decoy is not None
    torch.manual_seed(11)
    with torch.no_grad():
        careless = case.decoy(module, case.inputs(tokens)[0])
    assert torch.isfinite(careless).all()
    if careless.shape == right.shape:
        assert distance(careless, right) > case.decoy_floor


def flagged(flag: str) -> pytest.MarkDecorator:
    chosen = [case for case in CASES.values() if getattr(case, flag)]
    assert chosen
    return pytest.mark.parametrize("case", chosen, ids=[case.name for case in chosen])


@flagged("random")
def test_random_cases_draw(case: Case) -> None:
    module = case.make()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with torch.no_grad():
        module(*case.inputs(random_tokens(7, case.dim)))
    assert not torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.random])
def test_others_do_not_draw(name: str) -> None:
    module = CASES[name].make()
    before = torch.get_rng_state()
    with torch.no_grad():
        module(*CASES[name].inputs(random_tokens(7, CASES[name].dim)))
    assert torch.equal(before, torch.get_rng_state())


@flagged("mutates_input")
def test_mutating_cases_mutate(case: Case) -> None:
    tokens = random_tokens(7, case.dim)
    kept = tokens.clone()
    call(case, case.make(), tokens)
    assert not torch.equal(tokens, kept)


@flagged("stateful")
def test_stateful_cases_remember(case: Case) -> None:
    module, tokens = case.make(), random_tokens(33, case.dim)
    runs = [call(case, module, tokens)[0] for _ in range(3)]
    assert any(distance(run, runs[0]) > 1e-3 for run in runs[1:])


@flagged("perturb")
def test_perturbed_weights_matter(case: Case) -> None:
    module, tokens = case.make(), random_tokens(33, case.dim)
    before = call(case, module, tokens)[0]
    assert case.perturb is not None
    case.perturb(module)
    assert distance(call(case, module, tokens)[0], before) > 1e-3


def test_every_case_says_why() -> None:
    assert all(len(case.why) > 20 or "positive" in case.tags for case in CASES.values())
    assert len({case.why for case in CASES.values()}) == len(CASES)
