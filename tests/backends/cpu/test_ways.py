"""Every fast way against the meaning of the op, over routings and layouts that could break one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from moec.backends.cpu.choose import EACH
from tests.backends.cpu.layers import PACKED, WAYS, Case, assert_right, error, inputs, make

Ids = Callable[[int, int, int], torch.Tensor]
ROUTINGS: dict[str, Ids] = {
    "all to one expert": lambda t, k, e: torch.full((t, k), e - 1),
    "the same expert twice": lambda t, k, e: torch.randint(0, e, (t, 1)).expand(t, k),
    "few experts": lambda t, k, e: torch.randint(0, max(1, e // 4), (t, k)),
    "every other expert": lambda t, k, e: torch.randint(0, (e + 1) // 2, (t, k)) * 2,
    "most to the first": lambda t, k, e: (torch.rand(t, k) ** 4 * e).long(),
    "some to none": lambda t, k, e: torch.where(torch.rand(t, k) < 0.4, e, torch.randint(0, e, (t, k))),
    "negative ids": lambda t, k, e: torch.where(torch.rand(t, k) < 0.4, -1, torch.randint(0, e, (t, k))),
    "far outside": lambda t, k, e: torch.where(torch.rand(t, k) < 0.4, 2**31 - 1, torch.randint(0, e, (t, k))),
    "all to none": lambda t, k, e: torch.full((t, k), e),
}
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread, which a busy machine runs far faster, except where a test is about more."""
    before = torch.get_num_threads()
    torch.set_num_threads(2 if "several_cores" in request.fixturenames else 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def several_cores() -> None:
    """For tests that run on more than one."""


def case_for(way: str, case: Case) -> Case:
    if way not in case.ways():
        pytest.skip(f"{way} cannot run this layer here")
    return case


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 17, 200])
@pytest.mark.parametrize("shape", [(8, 2, 64, 96), (64, 8, 32, 16), (5, 3, 33, 7), (1, 1, 16, 8)], ids=str)
def test_plain_layers(way: str, dtype: torch.dtype, tokens: int, shape: tuple[int, int, int, int]) -> None:
    experts, k, d, f = shape
    case = case_for(way, make(experts, d, f, dtype=dtype))
    assert_right(case, way, *inputs(case, tokens, k))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("name", ROUTINGS)
def test_routings(way: str, dtype: torch.dtype, tokens: int, name: str) -> None:
    case = case_for(way, make(12, 48, 24, dtype=dtype, o=40))
    x, _, weights = inputs(case, tokens, 4)
    found = assert_right(case, way, x, ROUTINGS[name](tokens, 4, 12), weights)
    assert name != "all to none" or not found.any()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", ["concat", "concat_up_first", "interleaved", "interleaved_up_first", "pair", "none"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("storage", ["plain", "turned", "listed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(way: str, layout: str, bias: bool, storage: str, dtype: torch.dtype) -> None:
    turned, listed = storage == "turned", storage == "listed"
    case = case_for(way, make(9, 40, 24, dtype=dtype, layout=layout, bias=bias, turned=turned, listed=listed))
    for tokens in (1, 30, 150):
        assert_right(case, way, *inputs(case, tokens, 3))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "attributes",
    [
        {"fn": "silu", "alpha": 1.702, "limit": 0.7, "up_shift": 1.0},
        {"fn": "silu", "limit": 0.3, "clamp_after": True},
        *({"fn": fn} for fn in ("gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "sigmoid", "tanh", "softplus")),
        {"fn": "identity"},
    ],
    ids=str,
)
def test_activations(way: str, attributes: dict[str, Any]) -> None:
    for layout in ("concat", "interleaved", "none"):
        more = {name: value for name, value in attributes.items() if layout != "none" or name != "up_shift"}
        for dtype in DTYPES:
            case = case_for(way, make(6, 32, 24, dtype=dtype, layout=layout, **more))
            # Few rows and many have weights on different sides of a product.
            for x, ids, weights in (inputs(case, tokens, 2) for tokens in (1, 5, 20, 70)):
                if dtype == torch.float32:
                    assert_right(case, way, x, ids, weights)
                else:
                    assert error(case.run(way, x, ids, weights), case.meaning(x, ids, weights)) < 1e-2


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_token_stays_in_its_row(way: str, dtype: torch.dtype, bad: float) -> None:
    case = case_for(way, make(6, 32, 24, dtype=dtype))
    for tokens in (3, 40):
        x, ids, weights = inputs(case, tokens, 2)
        clean = case.run(way, x, ids, weights)
        x = x.clone()
        x[1] = bad
        found = case.run(way, x, ids, weights)
        rest = torch.arange(tokens) != 1
        assert torch.equal(found[rest], clean[rest])
        assert not found[1].isfinite().any()
        assert torch.equal(found.isnan(), case.meaning(x, ids, weights).isnan())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("storage", ["plain", "turned", "listed"])
def test_experts_that_are_not_hit_are_not_read(way: str, dtype: torch.dtype, storage: str) -> None:
    turned, listed = storage == "turned", storage == "listed"
    case = make(16, 32, 24, dtype=dtype, bias=True, turned=turned, listed=listed)
    for experts in case.weights.values():
        for e in range(1, 16, 3):
            experts[e].fill_(float("nan"))
    # What is packed may hold them, so that they are packed with what they are.
    case = case_for(way, case)
    for tokens in (1, 50):
        x, _, weights = inputs(case, tokens, 4)
        ids = torch.randint(0, 5, (tokens, 4)) * 3
        assert case.run(way, x, ids, weights).isfinite().all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("several_cores")
def test_the_same_bits_each_time(way: str, dtype: torch.dtype) -> None:
    case, other = case_for(way, make(32, 48, 24, dtype=dtype)), make(7, 80, 56, dtype=dtype)
    for tokens in (1, 9, 130):
        given = inputs(case, tokens, 4)
        first = case.run(way, *given)
        for _ in range(3):
            other.run(EACH, *inputs(other, 50, 3))
            assert torch.equal(case.run(way, *given), first)


@pytest.mark.parametrize("way", WAYS)
def test_tokens_lie_anyhow(way: str) -> None:
    case = case_for(way, make(6, 32, 24))
    x, ids, weights = inputs(case, 20, 2)
    wanted = case.run(way, x, ids, weights)
    wide = torch.zeros(20, 64)
    wide[:, ::2] = x
    turned = (ids.t().contiguous().t(), weights.t().contiguous().t())
    assert torch.equal(case.run(way, x.t().contiguous().t(), ids.int(), weights), wanted)
    assert torch.equal(case.run(way, wide[:, ::2], *turned), wanted)
    same = case.run(way, x[:1].expand(20, 32), ids, weights)
    assert error(same, case.meaning(x[:1].expand(20, 32), ids, weights)) < 2e-6


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_scales(way: str, scale: float) -> None:
    for dtype in DTYPES:
        case = case_for(way, make(6, 64, 24, dtype=dtype))
        x, ids, weights = inputs(case, 20, 2)
        assert_right(case, way, x * scale, ids, weights)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_other_element_types(dtype: torch.dtype) -> None:
    for layout in ("concat", "pair"):
        case = make(9, 40, 24, dtype=dtype, layout=layout, bias=True)
        for way in (None, *case.ways()):
            for tokens in (1, 30):
                assert_right(case, way, *inputs(case, tokens, 3))


def test_no_tokens() -> None:
    case = make(6, 32, 24, o=20)
    for way in (None, *case.ways()):
        x, ids, weights = torch.zeros(0, 32), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)
        assert case.run(way, x, ids, weights).shape == (0, 20)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_routing_weights_of_any_type(dtype: torch.dtype) -> None:
    for weights_dtype in (torch.float32, torch.bfloat16, torch.float64):
        case = make(6, 32, 24, dtype=dtype)
        for way in case.ways():
            x, ids, weights = inputs(case, 20, 2, weights_dtype=weights_dtype)
            assert error(case.run(way, x, ids, weights), case.meaning(x, ids, weights)) < 1e-2


@pytest.mark.usefixtures("several_cores")
def test_the_way_that_is_chosen_is_right() -> None:
    for shape in ((8, 64, 96), (64, 32, 16)):
        for dtype in DTYPES:
            case = make(*shape, dtype=dtype)
            for tokens in (1, 4, 30, 300):
                assert_right(case, None, *inputs(case, tokens, 4))


@pytest.mark.usefixtures("several_cores")
def test_threads_do_not_share_buffers() -> None:
    case = make(16, 64, 48)
    given = [inputs(case, 40 + i, 4, seed=i) for i in range(4)]
    wanted = [case.run(EACH, *one) for one in given]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(30):
            if not torch.equal(case.run(EACH, *given[i]), wanted[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_inference_mode_and_plain_mode_share_buffers() -> None:
    case = make(6, 32, 24)
    given = inputs(case, 20, 2)
    with torch.inference_mode():
        first = case.run(EACH, *given)
    with torch.no_grad():
        assert torch.equal(case.run(EACH, *given), first)


def test_packed_is_one_of_the_ways_where_onednn_is() -> None:
    if torch.backends.mkldnn.is_available():
        assert PACKED in make(6, 32, 24).ways()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_biases_with_gaps(dtype: torch.dtype) -> None:
    """Large enough for oneDNN, which takes any bias for a contiguous one."""
    case = make(2, 256, 512, dtype=dtype, bias=True)
    for name in ("b_in", "b_out"):
        bias = case.weights[name]
        assert isinstance(bias, torch.Tensor)
        wide = torch.full((*bias.shape, 3), 9.0, dtype=dtype)
        wide[..., 1] = bias
        case.weights[name] = wide[..., 1]
    strided = Case(case.op, case.weights, dtype, case.experts)
    for way in strided.ways():
        for tokens in (1, 70):
            assert_right(strided, way, *inputs(strided, tokens, 2))


def test_a_default_device_is_no_matter() -> None:
    case = make(6, 32, 24)
    given = inputs(case, 20, 2)
    for way in case.ways():
        wanted = case.run(way, *given)
        with torch.device("meta"):
            assert torch.equal(case.run(way, *given), wanted)
        assert torch.equal(case.run(way, *given), wanted)
