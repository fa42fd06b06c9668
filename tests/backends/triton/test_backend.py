"""Regions through the Triton back end against the reference, over weights that change between calls."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn

import moec
from moec.backendbase import Executable, load_backend, why_not
from moec.backends.triton.executable import TritonExecutable
from moec.backends.triton.graphs import by_row
from moec.backends.triton.prepare import prepare
from moec.compiler import choose_backend
from moec.errors import MoecError
from moec.ir import Builder, ConcatWeights, DenseFfn, ExpertFfn, Group, Region, Tensor, Weight
from moec.options import Options
from tests.backends.running import Weights

# The package has a function of this name.
triton_backend = import_module("moec.backends.triton.backend")
E, D, F, K = 5, 32, 24, 2


def experts(layout: str) -> Region:
    """x, experts, weights -> y, with gate and up as one weight, as two, or joined by the region."""
    b = Builder("experts")
    x = b.input("x", Tensor.of("f32", "T", D))
    ids, weights = b.input("experts", Tensor.of("i64", "T", K)), b.input("weights", Tensor.of("f32", "T", K))
    w_out = b.add(Weight(ref="down", type=Tensor.of("f32", E, D, F)))
    more: dict[str, Any] = {"layout": "concat"}
    if layout == "one":
        w_in = b.add(Weight(ref="both", type=Tensor.of("f32", E, 2 * F, D)))
    else:
        gate, up = (b.add(Weight(ref=ref, type=Tensor.of("f32", E, F, D))) for ref in ("gate", "up"))
        w_in = gate if layout == "pair" else b.add(ConcatWeights((gate, up), axis=1))
        more = {"layout": "pair", "w_up": up} if layout == "pair" else more
    return b.build(b.add(ExpertFfn(x, ids, weights, w_in, w_out, fn="silu", **more)))


def weights_for(layout: str, *, separate: bool, device: torch.device) -> Weights:
    found = Weights()
    add = found.separate if separate else found.stacked
    names = {"both": (2 * F, D)} if layout == "one" else {"gate": (F, D), "up": (F, D)}
    for name, shape in {**names, "down": (D, F)}.items():
        add(name, torch.randn(E, *shape, device=device) / shape[1] ** 0.5)
    return found


def inputs(tokens: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    scores, ids = torch.randn(tokens, E).softmax(1).topk(K, dim=1)
    return torch.randn(tokens, D).to(device), ids.to(device), scores.to(device)


def assert_same(mine: Executable, theirs: Executable, tokens: int, device: torch.device) -> None:
    given = inputs(tokens, device)
    (found,), (wanted,) = mine(*given), theirs(*given)
    assert (found - wanted).norm() <= 2e-6 * wanted.norm()


@pytest.mark.parametrize("layout", ["one", "pair", "joined"])
@pytest.mark.parametrize("separate", [False, True])
def test_weights_that_change_are_seen(layout: str, separate: bool, device: torch.device) -> None:
    weights = weights_for(layout, separate=separate, device=device)
    region = experts(layout)
    mine, theirs = (load_backend(name).build(region, weights.store(), {}) for name in ("triton", "reference"))
    assert "cost model" in mine.describe()
    assert_same(mine, theirs, 3, device)
    name = next(iter(weights.params))
    with torch.no_grad():
        weights.params[name].mul_(2)
    assert_same(mine, theirs, 3, device)
    weights.params[name].data = torch.randn_like(weights.params[name])
    assert_same(mine, theirs, 3, device)
    setattr(weights.module, name, nn.Parameter(torch.randn_like(weights.params[name]), requires_grad=False))
    assert_same(mine, theirs, 1, device)


def test_kernels_are_prepared_once(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []

    def counted(*args: Any, **more: Any) -> Any:
        made.append(args)
        return prepare(*args, **more)

    monkeypatch.setattr("moec.backends.triton.fused.prepare", counted)
    store = weights_for("joined", separate=True, device=device).store()
    mine = load_backend("triton").build(experts("joined"), store, {})
    for tokens in (1, 2, 1):
        mine(*inputs(tokens, device))
    assert len(made) == 1


def test_a_dense_ffn_of_any_rank(device: torch.device) -> None:
    b = Builder("ffn")
    x = b.input("x", Tensor.of("f32", "A", "B", D))
    w_in, w_out = (b.add(Weight(ref=r, type=Tensor.of("f32", *s))) for r, s in (("in", (F, D)), ("out", (D, F))))
    region = b.build(b.add(DenseFfn(x, w_in, w_out, fn="relu", layout="none")))
    weights = Weights().dense("in", torch.randn(F, D, device=device)).dense("out", torch.randn(D, F, device=device))
    mine, theirs = (load_backend(name).build(region, weights.store(), {}) for name in ("triton", "reference"))
    given = torch.randn(2, 3, D, device=device)
    (found,), (wanted,) = mine(given), theirs(given)
    assert found.shape == (2, 3, D)
    assert (found - wanted).norm() <= 2e-6 * wanted.norm()


def test_an_element_type_the_kernels_do_not_know_runs_by_its_meaning(device: torch.device) -> None:
    b = Builder("ffn")
    x = b.input("x", Tensor.of("f64", "T", D))
    w_in, w_out = (b.add(Weight(ref=r, type=Tensor.of("f64", *s))) for r, s in (("in", (F, D)), ("out", (D, F))))
    region = b.build(b.add(DenseFfn(x, w_in, w_out, fn="relu", layout="none")))
    weights = Weights()
    for ref, shape in (("in", (F, D)), ("out", (D, F))):
        weights.dense(ref, torch.randn(*shape, device=device, dtype=torch.float64))
    mine = load_backend("triton").build(region, weights.store(), {})
    assert "by its meaning: x holds f64" in mine.describe()
    given = torch.randn(3, D, device=device, dtype=torch.float64)
    assert torch.equal(mine(given)[0], load_backend("reference").build(region, weights.store(), {})(given)[0])


def test_an_input_elsewhere_is_refused(device: torch.device) -> None:
    mine = load_backend("triton").build(experts("one"), weights_for("one", separate=False, device=device).store(), {})
    assert isinstance(mine, TritonExecutable)
    mine._device = "xpu"
    with pytest.raises(MoecError, match="compiled for xpu, its input is on") as caught:
        mine(*inputs(2, device))
    assert caught.value.code == "MOEC404"


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda m: m.setattr(importlib.util, "find_spec", lambda name: None), "not installed"),
        (lambda m: m.setattr(torch.cuda, "is_available", lambda: False), "there is no CUDA device"),
        (lambda m: m.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5)), "7.5, the kernels need 8.0"),
        (lambda m: m.setattr(torch.version, "cuda", None), "another maker's GPUs"),
    ],
)
def test_why_not_here(act: Callable[[Any], None], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    act(monkeypatch)
    cuda = torch.device("cuda")
    assert says in why_not("triton", cuda)
    with pytest.raises(MoecError, match=says) as caught:
        choose_backend(Options.make(backend="triton"), cuda)
    assert caught.value.code == "MOEC408"
    name, why = choose_backend(Options.make(), cuda)
    assert name == "reference"
    assert says in why


def test_what_auto_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moec.compiler.why_not", lambda name, device: "")
    assert choose_backend(Options.make(), torch.device("cuda"))[0] == "triton"
    assert choose_backend(Options.make(), torch.device("cpu"))[0] == "reference"


def test_which_regions_take_rows_one_by_one() -> None:
    assert by_row(experts("one"))
    b = Builder("grouped")
    ids = b.input("ids", Tensor.of("i32", "T", K))
    order, offsets = b.add_many(Group(ids, experts=E), ["order", "offsets"])
    assert not by_row(b.build(order, offsets))


def test_a_compiled_model_runs_by_kernels(device: torch.device) -> None:
    class Ffn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(D, F), nn.Linear(F, D)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            down: torch.Tensor = self.down(nn.functional.gelu(self.up(x)))
            return down

    model = Ffn().eval().to(device)
    fast = moec.compile(model, backend="triton")
    (layer,) = fast.moec.report.layers
    assert layer.compiled, layer.reason
    assert layer.backend == "triton"
    x = torch.randn(2, 3, D, device=device)
    assert torch.allclose(fast(x), model(x), atol=1e-5)
    assert layer.fallbacks == 0
