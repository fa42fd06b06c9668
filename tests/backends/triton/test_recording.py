"""Gradients by kernels against autograd through plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from moec.backendbase import load_backend
from tests.backends.triton.recording import Given, Layer, by_kernels, by_torch, distance, gradients, make

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
INTERPRETED = 2e-2
"""Triton's interpreter cuts bf16 off where a GPU rounds it."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "concat": {},
    "concat_up_first": {"layout": "concat_up_first"},
    "interleaved": {"layout": "interleaved", "bias": True, "alpha": 1.702, "limit": 4.0, "up_shift": 1.0},
    "pair": {"layout": "pair", "bias": True},
    "not gated": {"layout": "none", "fn": "relu2", "bias": True},
    "turned": {"turned": True},
    "separate": {"separate": True, "bias": True},
    "separate pair": {"separate": True, "layout": "pair", "turned": True},
    "wider out": {"o": 56},
}


def assert_right(layer: Layer, given: Given, bar: float = 3e-6) -> None:
    """Gradients in fp32 within a bar of those in fp64; in 16 bits at most 1.5 times as far from them as torch's own."""
    dy = torch.randn(given[0].shape[0], layer.o).to(given[0].device, layer.dtype)
    found, exact = by_kernels(layer, given, dy), by_torch(layer, given, dy, F64)
    own = by_torch(layer, given, dy) if layer.dtype != F32 else {}
    assert found.keys() == exact.keys()
    for name, gradient in found.items():
        least = 1.5 * distance(own[name], exact[name]) + 1e-6 if own else bar
        if layer.dtype == BF16 and dy.device.type == "cpu":
            least = max(least, INTERPRETED)
        assert distance(gradient, exact[name]) <= least, name


SOME = ("concat", "interleaved", "not gated")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, device: torch.device) -> None:
    layer = make(5, 32, 24, device=device, **LAYOUTS[layout])
    assert_right(layer, layer.inputs(13, 2))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize(
    "layout", [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_layouts_in_16_bits(layout: str, dtype: torch.dtype, device: torch.device) -> None:
    layer = make(5, 32, 24, dtype=dtype, device=device, **LAYOUTS[layout])
    assert_right(layer, layer.inputs(30, 2))


FUNCTIONS = ["identity", "gelu", "gelu_tanh", "quick_gelu", "relu", "sigmoid", "tanh", "softplus"]


@pytest.mark.parametrize("fn", [fn if "gelu" in fn else pytest.param(fn, marks=pytest.mark.slow) for fn in FUNCTIONS])
def test_activations(fn: str, device: torch.device) -> None:
    for layout in ("concat", "none"):
        layer = make(2, 16, 16, device=device, fn=fn, layout=layout)
        x, ids, weights = layer.inputs(4, 1)
        for scale in (1.0, 1e-3, 20.0):
            assert_right(layer, (x * scale, ids, weights), 2e-5)


@pytest.mark.parametrize("after", [False, True])
def test_clamps(after: bool, device: torch.device) -> None:
    for layout in ("interleaved", "none"):
        layer = make(2, 16, 16, device=device, limit=0.3, clamp_after=after, layout=layout)
        assert_right(layer, layer.inputs(6, 2))


ROUTINGS: dict[str, Callable[[int, int, int], torch.Tensor]] = {
    "all to one expert": lambda t, k, e: torch.full((t, k), e - 1),
    "the same expert twice": lambda t, k, e: torch.randint(0, e, (t, 1)).expand(t, k),
    "some to none": lambda t, k, e: torch.where(torch.rand(t, k) < 0.4, e, torch.randint(0, e, (t, k))),
    "all to none": lambda t, k, e: torch.full((t, k), -1),
}


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings(routing: str, device: torch.device) -> None:
    """Experts without tokens, and pairs without an expert, get zeros."""
    layer = make(6, 16, 24, device=device, layout="none", bias=True)
    for tokens, k in ((1, 2), (9, 1), (7, 3)):
        x, _, weights = layer.inputs(tokens, k)
        assert_right(layer, (x, ROUTINGS[routing](tokens, k, 6).to(device), weights))


@pytest.mark.parametrize(
    "shape", [(5, 1, 33, 7), (2, 2, 16, 100), pytest.param((40, 9, 20, 12), marks=pytest.mark.slow)]
)
def test_odd_sizes(shape: tuple[int, int, int, int], device: torch.device) -> None:
    experts, k, d, f = shape
    layer = make(experts, d, f, device=device)
    assert_right(layer, layer.inputs(19, k))


@pytest.mark.slow
def test_many_pairs(device: torch.device) -> None:
    layer = make(3, 16, 16, device=device)
    assert_right(layer, layer.inputs(1400, 3))


def test_routing_weights_of_any_type(device: torch.device) -> None:
    for dtype, bar in ((F64, 3e-6), (BF16, 2e-2)):
        layer = make(4, 16, 16, device=device, weights_dtype=dtype)
        assert_right(layer, layer.inputs(5, 2, weights_dtype=dtype), bar)


def test_gradients_of_any_strides(device: torch.device) -> None:
    layer = make(4, 16, 16, device=device)
    given = layer.inputs(6, 2)
    dy = torch.randn(6, 16, device=device)
    wanted = by_kernels(layer, given, dy)
    executable, params = layer.executable(), layer.weights.params
    turned = given[0].t().contiguous().t(), given[1].t().contiguous().t(), given[2].t().contiguous().t()
    for one in (dy.t().contiguous().t(), torch.stack([dy, dy], 2)[:, :, 0]):
        found = gradients(executable, turned, params, one)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    (same,) = torch.autograd.grad(executable(*given)[0].sum(), [params["w_out"]])
    (ones,) = torch.autograd.grad(executable(*given)[0], [params["w_out"]], torch.ones_like(dy))
    assert torch.equal(same, ones)


def test_the_same_bits_each_time(device: torch.device) -> None:
    layer = make(5, 32, 24, dtype=BF16, device=device, bias=True)
    given, dy = layer.inputs(20, 2), torch.randn(20, 32, device=device)
    first, second = (by_kernels(layer, given, dy) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_bad_token_stays_in_its_row(device: torch.device) -> None:
    layer = make(4, 16, 16, device=device)
    x, ids, weights = layer.inputs(6, 1)
    ids[:] = torch.tensor([[0], [1], [0], [2], [2], [3]])
    dy = torch.randn(6, 16, device=device)
    clean = by_kernels(layer, (x, ids, weights), dy)
    bad = x.clone()
    bad[1] = float("nan")
    found = by_kernels(layer, (bad, ids, weights), dy)
    rest = torch.arange(6) != 1
    assert torch.equal(found["x"][rest], clean["x"][rest])
    for name in ("w_in", "w_out"):
        others = torch.arange(4) != 1
        assert torch.equal(found[name][others], clean[name][others])
        assert found[name][1].isnan().any()


@pytest.mark.parametrize("asked", ["x", "weights", "w_in", "w_out", "b_in", "b_out"])
def test_only_what_is_asked_for(asked: str, device: torch.device) -> None:
    layer = make(4, 16, 16, device=device, bias=True)
    x, ids, weights = layer.inputs(6, 2)
    dy = torch.randn(6, 16, device=device)
    wanted = by_kernels(layer, (x, ids, weights), dy)[asked]
    params = layer.weights.params
    for name, p in params.items():
        p.requires_grad_(name == asked)
    x.requires_grad_(asked == "x")
    weights.requires_grad_(asked == "weights")
    (y,) = layer.executable()(x, ids, weights)
    y.backward(dy)
    found = {"x": x, "weights": weights, **params}
    mine = found.pop(asked).grad
    assert mine is not None
    assert torch.equal(mine, wanted)
    assert all(t.grad is None for t in found.values())


def test_what_is_kept_for_the_backward(device: torch.device) -> None:
    """Beside inputs and parameters: gate and up of each pair, and the grouping."""
    layer = make(4, 64, 48, dtype=BF16, device=device)
    x, ids, weights = layer.inputs(50, 2)
    kept: dict[int, int] = {}
    own: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    given = [*layer.weights.params.values(), x, ids, weights]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer.executable()(x.requires_grad_(), ids, weights)
        mine = sum(n for at, n in kept.items() if at not in {t.untyped_storage().data_ptr() for t in given})
        kept, own = own, kept
        layer.plain(x, ids, weights, layer.weights.params)
    torchs = sum(n for at, n in kept.items() if at not in {t.untyped_storage().data_ptr() for t in given})
    gate_and_up = 50 * 2 * 2 * 48 * 2
    assert gate_and_up <= mine <= gate_and_up + 4 * (4 + 5 + 3 + 3 * 100)
    assert mine < 0.6 * torchs


def test_a_write_in_between_is_refused(device: torch.device) -> None:
    layer = make(4, 16, 16, device=device)
    x, ids, weights = layer.inputs(6, 2)
    for written in (layer.weights.params["w_out"], x):
        (y,) = layer.executable()(x, ids, weights)
        with torch.no_grad():
            written.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_weights_that_moved_in_between_are_the_forwards(device: torch.device) -> None:
    layer = make(4, 16, 16, device=device)
    given, dy = layer.inputs(6, 2), torch.randn(6, 16, device=device)
    wanted = by_kernels(layer, given, dy)["x"]
    executable, x = layer.executable(), given[0].clone().requires_grad_()
    (y,) = executable(x, *given[1:])
    layer.weights.params["w_in"].data = torch.randn_like(layer.weights.params["w_in"])
    executable(x, *given[1:])
    (found,) = torch.autograd.grad(y, [x], dy)
    assert torch.equal(found, wanted)


def test_gradients_of_gradients(device: torch.device) -> None:
    layer = make(4, 12, 8, device=device, bias=True)
    x, ids, weights = layer.inputs(5, 2)
    params = layer.weights.params
    executable = layer.executable()

    def second(run: Any) -> list[torch.Tensor]:
        given = x.clone().requires_grad_(), weights.clone().requires_grad_()
        wanted = [*given, *params.values()]
        y = run(given[0], ids, given[1])
        first = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), wanted))  # type: ignore[arg-type]

    mine, theirs = (
        second(lambda *given: executable(*given)[0]),
        second(lambda x, ids, weights: layer.plain(x, ids, weights, params)),
    )
    assert all(distance(a, b) < 1e-5 for a, b in zip(mine, theirs, strict=True))


def test_twice_through_one_graph(device: torch.device) -> None:
    layer = make(4, 16, 16, device=device)
    x, ids, weights = layer.inputs(6, 2)
    w, dy = layer.weights.params["w_in"], torch.randn(6, 16, device=device)
    (y,) = layer.executable()(x, ids, weights.requires_grad_())
    first = torch.autograd.grad(y, [w, weights], dy, retain_graph=True)
    (alone,) = torch.autograd.grad(y, [weights], dy, retain_graph=True)
    again = torch.autograd.grad(y, [w, weights], dy)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(first[1], alone)


def test_under_a_checkpoint(device: torch.device) -> None:
    layer = make(4, 16, 16, device=device)
    given, dy = layer.inputs(6, 2), torch.randn(6, 16, device=device)
    executable = layer.executable()
    wanted = gradients(executable, given, layer.weights.params, dy)
    again = gradients(
        lambda *a: (checkpoint(lambda *b: executable(*b)[0], *a, use_reentrant=False),),
        given, layer.weights.params, dy,
    )  # fmt: skip
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)


def test_no_tokens_and_no_choices(device: torch.device) -> None:
    layer = make(4, 16, 16, device=device)
    executable = layer.executable()
    for x, ids, weights in (layer.inputs(3, 0), tuple(t[:0] for t in layer.inputs(3, 2))):
        (y,) = executable(x.requires_grad_(), ids, weights)
        assert y.shape == x.shape
        assert not y.any()


def test_parameters_of_experts_without_tokens(device: torch.device) -> None:
    for absent in (False, True):
        layer = make(5, 16, 16, device=device, separate=True)
        x, ids, weights = layer.inputs(3, 1)
        ids[:] = 3
        found = load_backend("triton").recording(layer.region, layer.weights.store(), absent=absent)  # type: ignore[attr-defined]
        found(x, ids, weights)[0].sum().backward()
        for name, p in layer.weights.params.items():
            assert (p.grad is None) == (absent and not name.endswith("3")), name
            assert name.endswith("3") or p.grad is None or not p.grad.any()
