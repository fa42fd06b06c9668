"""Each layer compiled and equal to what its package computes, or left alone with a true reason."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch

import moec
from moec.report import LayerReport
from tests.frontend.compare import relative, tensors
from tests.thirdparty import layers
from tests.thirdparty.layers import Layer

PLACES = "rows given by their places"
DENSE = "a dense mixture, all experts take all rows"
EVERY = (
    Layer(
        "mixture-of-experts", "one-hot capacity einsum", partial(layers.mixture_of_experts, "all"), layers.sequences,
        form=PLACES,
    ),
    Layer(
        "mixture-of-experts, random second choice", "one-hot capacity einsum, drawn in eval",
        partial(layers.mixture_of_experts, "random"), layers.sequences, form=PLACES, random=True,
    ),
    Layer(
        "mixture-of-experts, hierarchical", "gates at two levels", layers.hierarchical, layers.sequences,
        form="axes 0 to 1 of the rows count experts, 3 x 4",
    ),
    Layer(
        "st-moe-pytorch", "capacity einsum, list of experts, gates drawn in eval", layers.st_moe, layers.sequences,
        form=PLACES, random=True,
    ),
    Layer(
        "st-moe-pytorch, whole block", "norm, capacity einsum, a feed-forward behind", layers.st_moe_block,
        layers.sequences, form=PLACES, random=True, others=2,
    ),
    Layer("soft-moe-pytorch", "Soft MoE", layers.soft_moe, layers.sequences, form=PLACES),
    Layer(
        "soft-moe-pytorch, dynamic slots", "Soft MoE, padded", layers.soft_moe_dynamic, layers.sequences, 0,
        reason="different operations at different shapes",
    ),
    Layer(
        "PEER-pytorch", "product keys over embeddings", layers.peer, layers.sequences, 0,
        reason="64 experts of one hidden unit each",
    ),
    Layer(
        "fairscale MOELayer", "capacity einsum, all-to-all", layers.fairscale, layers.fours, 0,
        reason="draws random numbers", random=True, inplace=True,
    ),
    Layer(
        "deepspeed MoE", "capacity, top 1, who is dropped drawn in eval", layers.deepspeed, layers.sequences,
        form=PLACES, random=True, inplace=True,
    ),
    Layer(
        "deepspeed MoE, top 2", "capacity, top 2",
        partial(layers.deepspeed, k=2, eval_capacity_factor=0.5, top2_2nd_expert_sampling=False), layers.sequences,
        form=PLACES, inplace=True,
    ),
    Layer(
        "deepctr-torch MMOE", "dense mixture, a gate for each task",
        partial(layers.deepctr, "MMOE", num_experts=3), layers.features, form=DENSE,
    ),
    Layer(
        "deepctr-torch MMOE, batch norm", "dense mixture, experts of three layers with batch norm",
        partial(layers.deepctr, "MMOE", num_experts=3, dnn_use_bn=True, expert_dnn_hidden_units=(24, 12, 8)),
        layers.features, form="batch norm (eps 1e-05); relu; batch norm",
    ),
    Layer(
        "deepctr-torch PLE", "dense mixture, experts of tasks and shared ones",
        partial(layers.deepctr, "PLE", shared_expert_num=2, specific_expert_num=2, num_levels=1), layers.features,
        form="6 experts, all of them run and unified, take the same rows",
    ),
    Layer(
        "deepctr-torch PLE, two levels", "dense mixtures one behind the other",
        partial(layers.deepctr, "PLE", shared_expert_num=1, specific_expert_num=2, num_levels=2), layers.features,
        form="level 2: 5 experts, all of them run and unified, take 3 tensors of rows",
    ),
    Layer(
        "torch-rechub MMOE", "dense mixture, experts with batch norm", partial(layers.rechub, "MMOE", 4), layers.rows,
        form="batch norm (eps 1e-05); relu",
    ),
    Layer(
        "torch-rechub PLE", "dense mixtures one behind the other, batch norm", partial(layers.rechub, "PLE", 2, 2, 1),
        layers.rows, form="level 2: 5 experts, all of them run and unified, take 3 tensors of rows",
    ),
    Layer("pytorch-mixtures TopkMoE", "loop over a list", partial(layers.mixtures, "TopkMoE"), layers.sequences),
    Layer(
        "pytorch-mixtures ExpertChoiceMoE", "expert choice", partial(layers.mixtures, "ExpertChoiceMoE"),
        layers.sequences, form="the tokens it chose",
    ),
    Layer(
        "switch-transformers", "dense, gates normalised over the batch, prints", layers.switch, layers.rows, 0,
        reason="may branch on it",
    ),
    Layer("litgpt LLaMAMoE", "loop over masks", layers.litgpt, layers.sequences),
    Layer("gpt-fast's style", "gathered weights, einsum", layers.Gathered, layers.sequences),
)  # fmt: skip
NAMES = {layer.name: layer for layer in EVERY}

pytestmark = pytest.mark.filterwarnings("ignore")


@cache
def pair(name: str) -> tuple[Any, Any]:
    """(original, compiled); one that cannot be copied is compiled in place, beside another of the same weights."""
    layer = NAMES[name]
    made = []
    for _ in range(2 if layer.inplace else 1):
        torch.manual_seed(3)
        made.append(layer.build().eval())
    torch.manual_seed(4)
    fast = moec.compile(made[-1], example_inputs=layer.inputs(2, 20), inplace=layer.inplace)
    return made[0], fast


def mixtures(name: str) -> list[LayerReport]:
    return [layer for layer in pair(name)[1].moec.report.layers if layer.kind == "moe"]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_compiled(name: str) -> None:
    listing = "\n".join(f"{layer.name} {layer.kind} {layer.status} {layer.reason}" for layer in mixtures(name))
    good = [layer for layer in mixtures(name) if layer.status == "compiled"]
    assert len(good) == NAMES[name].compiled, listing
    beside = [layer for layer in pair(name)[1].moec.report.layers if layer.kind == "ffn" and layer.status == "compiled"]
    assert len(beside) == NAMES[name].others, listing
    for layer in good:
        assert layer.max_error is not None
        assert layer.bar is not None
        assert layer.max_error <= layer.bar
        assert any(NAMES[name].form in line for line in layer.evidence), layer.evidence


@pytest.mark.parametrize("name", [name for name, layer in NAMES.items() if layer.reason])
def test_what_is_left_alone_says_why(name: str) -> None:
    reasons = [layer.reason for layer in mixtures(name) if layer.status == "left alone"]
    assert any(NAMES[name].reason in reason for reason in reasons), reasons


@pytest.mark.parametrize("name", NAMES)
def test_what_draws_random_numbers_in_eval(name: str) -> None:
    """Whether the original gives something else with another seed; what is compiled follows the seed, too (below)."""
    found = []
    for seed in range(4):
        torch.manual_seed(seed)
        with torch.no_grad():
            found.append(tensors(pair(name)[0](*NAMES[name].inputs(2, 20)))[0])
    same = all(torch.equal(found[0], other) for other in found[1:])
    assert same != NAMES[name].random


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 20), (3, 20), (2, 20)], ids=str)
@pytest.mark.parametrize("scale", [0.2, 1.0, 8.0])
def test_results(name: str, shape: tuple[int, int], scale: float) -> None:
    original, fast = pair(name)
    inputs = NAMES[name].inputs(*shape)
    given = inputs if NAMES[name].inputs is layers.features else tuple(scale * x for x in inputs)
    found = []
    for module in (original, fast):
        torch.manual_seed(7)
        with torch.no_grad():
            found.append(tensors(module(*given)))
    assert len(found[0]) == len(found[1]) > 0
    for want, got in zip(*found, strict=True):
        assert want.shape == got.shape
        if want.is_floating_point():
            assert max(relative(got, want)) <= 2e-6
        else:
            assert torch.equal(got, want)
