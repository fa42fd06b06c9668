"""Every path of the Triton kernels against the meaning of the op, over routings and layouts that could break one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from moec.backends.triton.operands import Operands
from moec.backends.triton.prepare import prepare
from tests.backends.cpu.layers import error, inputs
from tests.backends.triton.kernels.running import (
    BARS,
    DEVICE,
    PATHS,
    Case,
    assert_right,
    can,
    make,
    meaning,
    ready,
    run,
)

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
Ids = Callable[[int, int, int], torch.Tensor]
ROUTINGS: dict[str, Ids] = {
    "all to one expert": lambda t, k, e: torch.full((t, k), e - 1),
    "the same expert twice": lambda t, k, e: torch.randint(0, e, (t, 1)).expand(t, k),
    "every other expert": lambda t, k, e: torch.randint(0, (e + 1) // 2, (t, k)) * 2,
    "some to none": lambda t, k, e: torch.where(torch.rand(t, k) < 0.4, e, torch.randint(0, e, (t, k))),
    "negative ids": lambda t, k, e: torch.where(torch.rand(t, k) < 0.4, -1, torch.randint(0, e, (t, k))),
    "far outside": lambda t, k, e: torch.where(torch.rand(t, k) < 0.4, 2**31 - 1, torch.randint(0, e, (t, k))),
    "all to none": lambda t, k, e: torch.full((t, k), e),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "concat": {},
    "concat_up_first": {"layout": "concat_up_first"},
    "interleaved": {"layout": "interleaved", "bias": True, "alpha": 1.702, "limit": 0.7, "up_shift": 1.0},
    "interleaved_up_first": {"layout": "interleaved_up_first"},
    "pair": {"layout": "pair", "bias": True},
    "not gated": {"layout": "none", "fn": "relu2", "bias": True},
    "turned": {"turned": True},
    "turned pair": {"turned": True, "layout": "pair", "bias": True},
    "listed": {"listed": True, "bias": True},
    "listed pair": {"listed": True, "layout": "pair"},
    "wider out": {"o": 56},
}


def few(path: str, tokens: int) -> int:
    """Fewer for the path that runs a program for each row of a pair, which the interpreter is slow at."""
    return min(tokens, 5) if path == PATHS[0] and DEVICE.type == "cpu" else tokens


def prepared_for(path: str, case: Case) -> Any:
    prepared = ready(case)
    if not can(prepared, path):
        pytest.skip(f"{path} cannot run this layer")
    return prepared


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [F32, BF16, pytest.param(F16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(path: str, dtype: torch.dtype, layout: str) -> None:
    case = make(6, 32, 24, dtype=dtype, **LAYOUTS[layout])
    prepared = prepared_for(path, case)
    for tokens in (1, few(path, 21)):
        assert_right(case, prepared, path, *inputs(case, tokens, 2))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings(path: str, routing: str) -> None:
    torch.manual_seed(0)
    case = make(7, 32, 40, dtype=BF16)
    prepared = prepared_for(path, case)
    for tokens, dtype in ((3, torch.int32), (few(path, 30), torch.int64)):
        x, _, weights = inputs(case, tokens, 3)
        ids = ROUTINGS[routing](tokens, 3, 7).to(dtype)
        assert_right(case, prepared, path, x, ids, weights)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(5, 1, 33, 7), (2, 2, 16, 100), (12, 5, 130, 18), (1, 1, 16, 8)], ids=str)
def test_odd_sizes(path: str, shape: tuple[int, int, int, int]) -> None:
    experts, k, d, f = shape
    for dtype in (F32, BF16):
        case = make(experts, d, f, dtype=dtype)
        prepared = ready(case)
        if can(prepared, path):
            assert_right(case, prepared, path, *inputs(case, few(path, 19), k))


@pytest.mark.parametrize("fn", ["identity", "gelu", "gelu_tanh", "quick_gelu", "relu", "sigmoid", "tanh", "softplus"])
def test_activations(fn: str) -> None:
    for path in PATHS:
        case = make(4, 32, 16, dtype=F32, fn=fn)
        prepared = ready(case)
        for scale in (1.0, 1e-3, 30.0):
            if can(prepared, path):
                x, ids, weights = inputs(case, 3, 2)
                assert_right(case, prepared, path, x * scale, ids, weights)


@pytest.mark.parametrize("after", [False, True])
def test_clamps(after: bool) -> None:
    case = make(4, 32, 16, dtype=F32, limit=0.3, clamp_after=after)
    prepared = ready(case)
    for path in PATHS[:2]:
        assert_right(case, prepared, path, *inputs(case, 6, 2))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_token_stays_in_its_row(path: str, bad: float) -> None:
    case = make(6, 32, 24, dtype=BF16)
    prepared = prepared_for(path, case)
    for tokens in (3, few(path, 20)):
        x, ids, weights = inputs(case, tokens, 2)
        clean = run(prepared, path, x, ids, weights)
        x = x.clone()
        x[1] = bad
        found = run(prepared, path, x, ids, weights)
        rest = torch.arange(tokens) != 1
        assert torch.equal(found[rest], clean[rest])
        assert not found[1].isfinite().any()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("listed", [False, True])
def test_experts_that_are_not_hit_are_not_read(path: str, listed: bool) -> None:
    case = make(16, 32, 24, dtype=BF16, bias=True, listed=listed)
    for experts in case.weights.values():
        for e in range(1, 16, 3):
            experts[e].fill_(float("nan"))
    prepared = prepared_for(path, case)
    for tokens in (1, few(path, 20)):
        x, _, weights = inputs(case, tokens, 4)
        ids = torch.randint(0, 5, (tokens, 4)) * 3
        assert run(prepared, path, x, ids, weights).isfinite().all()


@pytest.mark.parametrize("path", PATHS)
def test_only_valid_rows_count(path: str) -> None:
    case = make(6, 32, 24, dtype=BF16)
    prepared = prepared_for(path, case)
    x, ids, weights = inputs(case, 8, 2)
    wanted = meaning(case, x, ids, weights)
    for count in (0, 5, 8, 99):
        spoiled, spoiled_ids = x.clone(), ids.clone()
        spoiled[count:], spoiled_ids[count:] = float("nan"), 3
        for dtype in (torch.int32, torch.int64):
            valid = torch.tensor([count], dtype=dtype, device=DEVICE)
            found = run(prepared, path, spoiled, spoiled_ids, weights, valid=valid)
            assert error(found[:count], wanted[:count]) <= BARS[BF16]
            assert not found[count:].any()


@pytest.mark.parametrize("path", PATHS)
def test_the_same_bits_each_time(path: str) -> None:
    case = make(12, 48, 24, dtype=BF16)
    prepared = prepared_for(path, case)
    for tokens in (1, few(path, 40)):
        given = inputs(case, tokens, 4)
        assert torch.equal(run(prepared, path, *given), run(prepared, path, *given))


def test_no_tokens_and_no_choices() -> None:
    case = make(6, 32, 24, o=20)
    prepared = ready(case)
    nothing = run(prepared, None, torch.zeros(0, 32), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    assert nothing.shape == (0, 20)
    none = run(prepared, None, torch.ones(3, 32), torch.zeros(3, 0, dtype=torch.int64), torch.zeros(3, 0))
    assert not none.any()


@pytest.mark.parametrize("path", PATHS)
def test_tokens_lie_anyhow(path: str) -> None:
    case = make(6, 32, 24, dtype=BF16)
    prepared = prepared_for(path, case)
    x, ids, weights = inputs(case, 6, 2)
    wanted = run(prepared, path, x, ids, weights)
    wide = torch.zeros(6, 64, dtype=BF16)
    wide[:, ::2] = x
    shifted = torch.zeros(6 * 32 + 1, dtype=BF16)
    shifted[1:] = x.flatten()
    turned = (ids.t().contiguous().t(), weights.t().contiguous().t())
    for other in (x.t().contiguous().t(), wide[:, ::2], shifted[1:].view(6, 32)):
        assert torch.equal(run(prepared, path, other, *turned), wanted)
    odd_ids = torch.zeros(13, dtype=torch.int32)
    odd_ids[1:] = ids.flatten()
    assert torch.equal(run(prepared, path, x, odd_ids[1:].view(6, 2), weights), wanted)


@pytest.mark.parametrize("path", PATHS)
def test_routing_weights_of_any_type(path: str) -> None:
    case = make(6, 32, 24, dtype=BF16)
    prepared = prepared_for(path, case)
    for dtype in (F32, BF16, torch.float64):
        x, ids, weights = inputs(case, 9, 2, weights_dtype=dtype)
        assert_right(case, prepared, path, x, ids, weights)


def test_weights_are_read_at_each_call() -> None:
    case = make(6, 32, 24, dtype=BF16)
    prepared = ready(case)
    given = inputs(case, 9, 2)
    assert_right(case, prepared, None, *given)
    for w in case.weights.values():
        assert isinstance(w, torch.Tensor)
        w.mul_(0.5)
    assert_right(case, prepared, None, *given)


def test_many_pairs_are_grouped_in_chunks() -> None:
    case = make(9, 16, 16, dtype=F32)
    prepared = ready(case)
    x, ids, weights = inputs(case, 1030, 4)
    ids[5] = 9
    assert_right(case, prepared, PATHS[1], x, ids, weights)


def test_one_expert_takes_every_row() -> None:
    for dtype in (F32, BF16):
        case = make(1, 32, 24, dtype=dtype, bias=True)
        prepared = ready(case)
        for tokens in (1, 9):
            x, ids, weights = inputs(case, tokens, 1)
            wanted = meaning(case, x, ids, torch.ones_like(weights))
            assert error(run(prepared, None, x), wanted) <= BARS[dtype]


def test_int8_weights_with_scales() -> None:
    case = make(6, 32, 24, dtype=F32, layout="pair")
    scales = {}
    for name, w in list(case.weights.items()):
        assert isinstance(w, torch.Tensor)
        scale = w.abs().amax(2) / 127
        case.weights[name] = (w / scale[:, :, None]).round()
        scales[name.replace("w_", "scale_")] = scale
    x, ids, weights = inputs(case, 7, 2)
    whole = {name: w * scales[name.replace("w_", "scale_")][:, :, None] for name, w in case.weights.items()}  # type: ignore[operator]
    kept, case.weights = case.weights, dict(whole)
    wanted = case.meaning(x, ids, weights)
    small = {name: w.to(torch.int8).to(DEVICE) for name, w in kept.items()}  # type: ignore[union-attr]
    operands = Operands(**small, **{name: scale.to(DEVICE) for name, scale in scales.items()})
    prepared = prepare(case.op, operands, DEVICE)
    for path in PATHS[:2]:
        assert error(run(prepared, path, x, ids, weights), wanted) <= BARS[F32]


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("k", [1, 16])
@pytest.mark.parametrize("experts", [2, 64, 512])
@pytest.mark.parametrize("tokens", [2, 33])
def test_many_shapes(path: str, k: int, experts: int, tokens: int) -> None:
    for dtype, layout in ((BF16, "concat"), (F32, "pair"), (F16, "interleaved")):
        case = make(experts, 40, 24, dtype=dtype, layout=layout)
        prepared = ready(case)
        if can(prepared, path):
            assert_right(case, prepared, path, *inputs(case, few(path, tokens), k))
