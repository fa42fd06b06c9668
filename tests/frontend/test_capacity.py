"""Capacities are named as ops where runs that crowd the experts prove them, and left to the code where they do not.

T tokens, B sequences, S tokens a sequence, D model width, E experts, K experts a token.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.backendbase import load_backend
from moec.commands.inspect import describe
from moec.frontends.torch.analyse import analyse
from moec.frontends.torch.lifted import Lifted
from moec.ir import Combine, Gather, Group, KeptWeights, Route, parse
from moec.passes import PlanCapacity
from moec.pipeline import run
from moec.weights import WeightStore
from tests.corpus import crowded
from tests.corpus.case import fill


def made(module: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        fill(module)
    return module.eval()


def lifted(module: nn.Module) -> Lifted:
    found = analyse(module, None, lambda step: None)
    (layer,) = [layer for layer in found.lifted if layer.kind == "moe"]
    return layer


_KNOWN: dict[str, tuple[nn.Module, Lifted]] = {}


def looked_at(kind: type[nn.Module]) -> tuple[nn.Module, Lifted]:
    """The module, a gate within a block, and its layer; looked at once."""
    if kind.__name__ not in _KNOWN:
        module = made(crowded.Crowded(kind()) if issubclass(kind, crowded.Gate) else kind())
        _KNOWN[kind.__name__] = module, lifted(module)
    return _KNOWN[kind.__name__]


def crowd(batch: int, length: int, seed: int) -> Tensor:
    """[B, S, D] whose tokens are alike enough for experts to be full."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, 16, generator=generator)
    x += 2.0 * torch.randn(1, 1, 16, generator=generator)
    return x


def check_drops(module: nn.Module, layer: Lifted, backend: str) -> None:
    """The named region gives the module's own results: at sizes and on tokens that were in no probe."""
    assert layer.named is not None
    router = module.get_submodule("gate.wg" if hasattr(module, "gate") else "router")
    built = load_backend(backend).build(layer.named, WeightStore(layer.module, layer.views), {})
    dropped = 0
    for i, (batch, length) in enumerate(((1, 2), (2, 19), (3, 29), (1, 67))):
        x = crowd(batch, length, seed=i)
        with torch.no_grad():
            theirs, logits = module(x), router(x.reshape(-1, 16))
            more = [torch.ones(length, dtype=torch.bool)] if "%sequence" in str(layer.named) else []
            (mine,) = built(x.reshape(-1, 16), logits, *more)
        assert torch.allclose(mine.view_as(theirs), theirs, rtol=1e-4, atol=1e-5)
        dropped += int((theirs == 0).all(-1).sum())
    assert dropped, "no token lost all of its experts"


NAMED = [
    pytest.param(
        crowded.Gate, 'priority="choice"', 'normalize="sum"', "ceil(5/8 T) slots of a batch", marks=pytest.mark.slow
    ),
    (
        crowded.Afterwards,
        'priority="choice"',
        'kept_weights(%chosen_weights, %order) {normalize="clamped_sum"',
        "scaled",
    ),
    (crowded.Surest, 'policy="weight"', "capacity=ceildiv(5T, 16)", "larger weights first"),
    pytest.param(
        crowded.TokenMajor, "max(T, floordiv(3T, 8) + 4)", 'normalize="sum"', "at least 4,", marks=pytest.mark.slow
    ),
    pytest.param(
        crowded.Multiple, "capacity=4*ceildiv(5T, 32)", 'priority="choice"', "4 ceil(", marks=pytest.mark.slow
    ),
    pytest.param(
        crowded.SureTokens, 'policy="token_weight"', "%weights", "largest best weight", marks=pytest.mark.slow
    ),
    pytest.param(crowded.Sigmoid, 'score="sigmoid"', "group(%experts)", "floor(3/4 T)", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("gate", "first", "second", "told"), NAMED)
def test_a_capacity_is_named_and_drops_the_same_slots(
    gate: type[crowded.Gate], first: str, second: str, told: str
) -> None:
    module, layer = looked_at(gate)
    assert first in str(layer.named), layer.evidence
    assert second in str(layer.named)
    assert any(told in line for line in layer.evidence), layer.evidence
    check_some(module, layer)


def check_some(module: nn.Module, layer: Lifted) -> None:
    """Two choices of four experts seldom lose both: drops are then seen in the weights."""
    assert layer.named is not None
    built = load_backend("reference").build(layer.named, WeightStore(layer.module, layer.views), {})
    (group,) = [node for node in layer.named.nodes if isinstance(node.op, Group)]
    assert isinstance(group.op, Group)
    assert group.op.capacity is not None
    full = 0
    for i, (batch, length) in enumerate(((1, 2), (2, 19), (1, 67))):
        x = crowd(batch, length, seed=i)
        with torch.no_grad():
            theirs = module(x)
            logits = module.get_submodule("gate.wg")(x.reshape(-1, 16))
            (mine,) = built(x.reshape(-1, 16), logits)
        assert torch.allclose(mine.view_as(theirs), theirs, rtol=1e-4, atol=1e-5)
        chosen = logits.topk(2 if "k=2" in str(layer.named) else 1).indices.flatten().bincount()
        full += int((chosen > group.op.capacity.evaluate({"T": batch * length})).sum())
    assert full, "no expert was full"


@pytest.mark.parametrize(
    ("kind", "named", "told"),
    [
        (crowded.Sequences, 'capacity=floordiv(S, 4) + 1, scope="sequence", sequence=S', "of a sequence of S tokens"),
        (crowded.Batch, "capacity=floordiv(T, 4) + 1} :", "of a batch of T tokens"),
        (crowded.EightEach, 'capacity=8, scope="sequence"', "of a sequence of S tokens"),
        (crowded.EightOfAll, "capacity=8} :", "of a batch of T tokens"),
    ],
)
def test_scopes_are_told_apart(kind: type[nn.Module], named: str, told: str) -> None:
    module, layer = looked_at(kind)
    assert named in str(layer.named)
    assert any(told in line for line in layer.evidence)
    check_drops(module, layer, "reference")


@pytest.mark.parametrize("kind", [crowded.Sequences, crowded.Batch])
def test_the_named_region_runs_in_onnxruntime(kind: type[nn.Module]) -> None:
    pytest.importorskip("onnxruntime")
    check_drops(*looked_at(kind), "onnxruntime")


@pytest.mark.parametrize(
    ("gate", "why"),
    [
        (crowded.Drawn, "draws random numbers"),
        (crowded.ByLoad, "follow from no score"),
        (crowded.Thresholded, "no sum of the results"),
        (crowded.Tempered, "follow from no score"),
        pytest.param(crowded.Latest, "explained by no order or scope at 1 sequence of 5", marks=pytest.mark.slow),
        pytest.param(crowded.WholeTokens, "explained by no order or scope", marks=pytest.mark.slow),
        pytest.param(crowded.Shared, "explained by no order or scope", marks=pytest.mark.slow),
    ],
)
def test_near_misses_are_left_to_the_code_with_the_reason(gate: type[crowded.Gate], why: str) -> None:
    _, layer = looked_at(gate)
    assert layer.named is None
    (line,) = [line for line in layer.evidence if "capacity" in line]
    assert line.startswith("its capacity is not named, and stays the code's own: ")
    assert why in line


class Floats(crowded.Gate):
    """ceil(1.1 T / 3) of floats is 34 at 90 tokens, where 1.1 / 3 of 90 is 33."""

    def capacity(self, tokens: int) -> int:
        return math.ceil(tokens * 2 * 1.1 / 6)


def test_a_size_that_floats_round_otherwise_is_not_named() -> None:
    assert math.ceil(90 * 2 * 1.1 / 6) == 34
    _, layer = looked_at(Floats)
    assert layer.named is None
    assert "which is no size of the tokens" in layer.evidence[-1]


class Square(crowded.Gate):
    def capacity(self, tokens: int) -> int:
        return math.isqrt(tokens)


def test_a_capacity_that_is_no_size_is_not_named() -> None:
    _, layer = looked_at(Square)
    assert layer.named is None
    assert "which is no size of the tokens" in layer.evidence[-1]


class Roomy(crowded.Gate):
    def capacity(self, tokens: int) -> int:
        return tokens


def test_experts_that_have_room_for_all_are_not_said_to_drop() -> None:
    _, layer = looked_at(Roomy)
    assert layer.named is None
    assert not any("capacity" in line for line in layer.evidence)


class Picky(crowded.Surest):
    """It refuses fewer tokens than it has places for at least."""

    least = 4

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert x.shape[0] >= self.least, "too few tokens"
        return super().forward(x)


def test_sizes_that_the_code_refuses_are_passed_over() -> None:
    _, layer = looked_at(Picky)
    assert 'policy="weight"' in str(layer.named), layer.evidence
    assert any("ceil(5/16 T), but at least 4, slots" in line for line in layer.evidence)


def test_equal_experts_cannot_tell_who_served_a_token() -> None:
    module = made(crowded.Crowded(crowded.Gate()))
    experts = module.get_submodule("experts")
    with torch.no_grad():
        for weights in experts.parameters():
            weights[1:] = weights[:1]
    layer = lifted(module)
    assert layer.named is None
    assert layer.evidence[-1].endswith("two of its experts compute the same, as copies do before they are trained")


class Noting(crowded.Gate):
    """A gate that keeps what it counted, as trainers do."""

    places: int

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dispatch, combine = super().forward(x)
        self.places = dispatch.shape[-1]
        return dispatch, combine


def test_looking_leaves_no_trace_and_the_report_tells_it_all() -> None:
    gate = Noting()
    gate.places = 3
    module = made(crowded.Crowded(gate))
    before = torch.get_rng_state()
    report = moec.explain(module)
    assert torch.equal(torch.get_rng_state(), before)
    assert gate.places == 3
    (layer,) = report.layers
    region = parse(layer.ir_named)
    kinds = [type(node.op) for node in region.nodes]
    assert [kind for kind in kinds if kind in (Route, Group, KeptWeights, Gather, Combine)] == [
        Route,
        Group,
        Gather,
        Combine,
    ]
    told = describe(layer)
    assert (
        "capacity: each of 4 experts takes at most ceil(5/8 T) slots of a batch of T tokens, all first choices" in told
    )
    assert "IR from the router's logits on, as proved by value" in told
    assert layer.to_dict()["ir_named"] == layer.ir_named
    # Passes read it as any region: it has a capacity already.
    _, (log,) = run(region, [PlanCapacity(factor=1.0)])
    assert log.skipped == ["%order: it has a capacity already, T - floordiv(3T, 8)"]
