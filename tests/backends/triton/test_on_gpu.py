"""What only a GPU can show: graphs, streams, captures by the user, models compiled where they are."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

import moec
from moec.backendbase import Executable, load_backend
from moec.backends.triton.graphs import BUCKETS, GraphedExecutable
from moec.ir import Add, Builder, ExpertFfn, Region, Tensor, Weight
from tests.backends.running import Weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
E, D, F, K = 8, 128, 96, 2
COUNTS = (1, 2, 3, 7, 16, 33, 64, 200, 512, 700)


def region(dtype: str = "bf16", *, residual: bool = True) -> Region:
    """Experts and, so that there is more than one op to capture, a residual."""
    b = Builder("experts")
    x = b.input("x", Tensor.of(dtype, "T", D))
    ids, weights = b.input("ids", Tensor.of("i64", "T", K)), b.input("weights", Tensor.of("f32", "T", K))
    w_in = b.add(Weight(ref="first", type=Tensor.of(dtype, E, 2 * F, D)))
    w_out = b.add(Weight(ref="second", type=Tensor.of(dtype, E, D, F)))
    y = b.add(ExpertFfn(x, ids, weights, w_in, w_out, fn="silu", layout="concat"))
    return b.build(b.add(Add(x, y)) if residual else y)


def weights_for(dtype: torch.dtype = torch.bfloat16) -> Weights:
    found = Weights()
    for name, shape in (("first", (E, 2 * F, D)), ("second", (E, D, F))):
        found.stacked(name, (torch.randn(*shape, device="cuda") / shape[-1] ** 0.5).to(dtype))
    return found


def inputs(tokens: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator("cuda").manual_seed(seed)
    top = torch.randn(tokens, E, device="cuda", generator=generator).topk(K, dim=1)
    return (
        torch.randn(tokens, D, device="cuda", generator=generator).to(dtype),
        top.indices,
        top.values.softmax(1),
    )


def both(weights: Weights) -> tuple[Executable, Executable]:
    backend = load_backend("triton")
    return tuple(backend.build(region(), weights.store(), {}, graphs=graphs) for graphs in (False, True))  # type: ignore[return-value]


def near(found: torch.Tensor, wanted: torch.Tensor, bar: float = 2e-2) -> bool:
    return bool((found.float() - wanted.float()).norm() <= bar * wanted.float().norm())


def test_graphs_compute_what_the_kernels_do() -> None:
    weights = weights_for()
    plain, graphed = both(weights)
    for count in (*COUNTS, *COUNTS):
        given = inputs(count, count)
        assert near(graphed(*given)[0], plain(*given)[0], 1e-2), count
    assert isinstance(graphed, GraphedExecutable)
    assert "captured: 1, 2, 4, 8, 16, 48, 64, 256, 512" in graphed.describe()
    assert max(BUCKETS) == 512


def test_a_region_of_one_op_is_not_captured() -> None:
    weights = weights_for()
    alone = load_backend("triton").build(region(residual=False), weights.store(), {}, graphs=True)
    alone(*inputs(4))
    assert "no CUDA graphs: a call is a few launches" in alone.describe()
    assert "captured" not in alone.describe()


def test_a_replay_gives_a_tensor_of_its_own() -> None:
    _, graphed = both(weights_for())
    first = graphed(*inputs(4, 1))[0]
    kept = first.clone()
    graphed(*inputs(4, 2))
    assert torch.equal(first, kept)


def test_graphs_follow_weights_that_change() -> None:
    weights = weights_for()
    plain, graphed = both(weights)
    given = inputs(5)
    graphed(*given)
    with torch.no_grad():
        weights.params["first"].mul_(2)
    assert near(graphed(*given)[0], plain(*given)[0], 1e-2)
    weights.params["second"].data = torch.randn_like(weights.params["second"])
    assert near(graphed(*given)[0], plain(*given)[0], 1e-2)


def test_streams_and_threads_do_not_disturb_each_other() -> None:
    plain, graphed = both(weights_for())
    given = [inputs(3 + i, i) for i in range(4)]
    wanted = [plain(*one)[0] for one in given]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for executable in (plain, graphed) * 25:
                if not near(executable(*given[i])[0], wanted[i], 1e-2):
                    wrong.append(i)

    # Captures of several threads at once would disturb each other in torch itself.
    for i in range(4):
        graphed(*given[i])
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("count", [1, 12, 900])
def test_under_a_capture_of_the_users(which: int, count: int) -> None:
    executable = both(weights_for())[which]
    given = inputs(count)
    wanted = executable(*given)[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (y,) = executable(*given)
    other = inputs(count, 9)
    for mine, theirs in zip(given, other, strict=True):
        mine.copy_(theirs)
    graph.replay()
    assert near(y, executable(*other)[0], 1e-2)
    assert not near(y, wanted, 1e-2)


def test_the_same_bits_each_time() -> None:
    plain, _ = both(weights_for())
    for count in COUNTS:
        given = inputs(count)
        first = plain(*given)[0]
        assert all(torch.equal(plain(*given)[0], first) for _ in range(5))


def test_a_call_does_not_wait_for_the_device() -> None:
    plain, graphed = both(weights_for())
    for executable in (plain, graphed):
        given = inputs(64)
        executable(*given)
        torch.cuda.synchronize()
        with torch.cuda.device(0):
            torch.cuda.set_sync_debug_mode("error")
            try:
                executable(*given)
            finally:
                torch.cuda.set_sync_debug_mode("default")


class Ffn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(D, F, bias=False), nn.Linear(D, F, bias=False)
        self.down = nn.Linear(F, D, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return y


class Block(nn.Module):
    """Loops over its experts, as models do."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E)
        self.experts = nn.ModuleList(Ffn() for _ in range(E))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, D)
        weights, ids = self.router(rows).softmax(-1).topk(K, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            tokens, choices = (ids == e).nonzero(as_tuple=True)
            if tokens.numel():
                y.index_add_(0, tokens, expert(rows[tokens]) * weights[tokens, choices, None])
        return y.reshape(x.shape)


def transformers_block(**options: Any) -> nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=D, moe_intermediate_size=F, num_experts=E, num_experts_per_tok=K, norm_topk_prob=True, **options
    )
    block: nn.Module = Qwen3MoeSparseMoeBlock(config)
    for p in block.parameters():
        nn.init.normal_(p, std=0.1)
    return block


@pytest.mark.parametrize("make", [Block, Ffn, transformers_block])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_models_are_compiled_where_they_are(make: Any, dtype: torch.dtype, mode: str) -> None:
    model = make().eval().to("cuda", dtype)
    fast = moec.compile(model, mode=mode)
    (layer,) = fast.moec.report.layers
    assert layer.compiled, layer.reason
    assert layer.backend == "triton"
    for shape in ((1, 1, D), (2, 5, D), (3, 40, D)):
        x = torch.randn(*shape, device="cuda", dtype=dtype)
        with torch.no_grad():
            assert near(fast(x), model(x), 2e-5 if dtype == torch.float32 else 2e-2)
    assert layer.fallbacks == 0


def test_gradients_are_the_models_own() -> None:
    model = Block().eval().to("cuda")
    fast = moec.compile(model)
    x = torch.randn(4, 6, D, device="cuda")
    grads = []
    for one in (model, fast):
        given = x.clone().requires_grad_()
        one.zero_grad()
        one(given).square().sum().backward()
        grads.append([p.grad.clone() for p in (given, *one.parameters()) if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > E
    for mine, theirs in zip(grads[1], grads[0], strict=True):
        assert near(mine, theirs, 1e-3)


def test_moving_the_model_away_is_said() -> None:
    model = moec.compile(Ffn().eval().to("cuda"))
    model.to("cpu")
    with pytest.warns(UserWarning, match="MOEC231"):
        model(torch.randn(3, D))
    assert model.moec.report.layers[0].fallbacks == 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_in_one_process() -> None:
    models = [Ffn().eval().to(f"cuda:{i}") for i in range(2)]
    fast = [moec.compile(model) for model in models]
    for _ in range(3):
        for i in (0, 1):
            x = torch.randn(5, D, device=f"cuda:{i}")
            with torch.no_grad():
                assert near(fast[i](x), models[i](x), 1e-4)
