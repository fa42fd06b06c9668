"""Weights that moec does not understand are refused by name, and the model goes on working."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import moec
from tests.corpus import CASES
from tests.corpus.blocks import LoopList, LoopStacked, Sorted, Swiglu
from tests.corpus.case import fill, random_tokens
from tests.frontend.modules import agree, left_alone, refusal, report_of, tokens


@pytest.mark.parametrize("style", [LoopList, LoopStacked, Sorted])
def test_meta_device(style: Any) -> None:
    with torch.device("meta"):
        model = style()
    assert "meta" in refusal(model.eval())


def test_half_of_a_model_on_meta() -> None:
    model = CASES["two_blocks"].make()
    model.second.to("meta")
    assert "meta" in refusal(model.second)
    with pytest.raises(Exception, match="meta"):
        model(*tokens("two_blocks"))


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def test_parametrized_stack() -> None:
    model = CASES["loop_stacked.swiglu"].make()
    parametrize.register_parametrization(model, "w1", Halved())
    assert "parametri" in refusal(model, tokens("loop_stacked.swiglu"))


def test_parametrized_ffn() -> None:
    model = CASES["ffn.swiglu"].make()
    parametrize.register_parametrization(model.up_proj, "weight", Halved())
    assert "parametri" in refusal(model, tokens("ffn.swiglu"))


class Int8Experts(LoopStacked):
    """Weight-only int8 by hand: int8 parameters and a scale a row, dequantised at each call."""

    def build_experts(self) -> None:
        super().build_experts()
        self.scale = nn.Parameter(torch.empty(self.num_experts, self.hidden, 1))

    def expert(self, e: int, rows: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(rows, self.w1[e].to(rows.dtype) * self.scale[e])), self.w2[e])


def test_int8_weights() -> None:
    model = Int8Experts(body="relu")
    fill(model)
    model.w1 = nn.Parameter((model.w1.detach() * 50).round().clamp(-127, 127).to(torch.int8), requires_grad=False)
    with torch.no_grad():
        model.scale.copy_(0.02 * (1.5 + torch.rand(model.scale.shape)))
    model.eval()
    x = random_tokens(33, 16)
    fast = moec.compile(model)
    agree(fast, model, (x,))
    reasons = [layer.reason for layer in left_alone(report_of(fast))]
    assert any(word in reason for reason in reasons for word in ("int8", "quanti")), reasons


@pytest.mark.filterwarnings("ignore")
def test_dynamically_quantised_linears() -> None:
    model = CASES["loop_list.gelu"].make()
    try:
        quantise: Any = torch.ao.quantization.quantize_dynamic
        quantised = quantise(model, {nn.Linear}, dtype=torch.qint8)
    except RuntimeError as error:
        pytest.skip(f"this torch quantises no Linear: {error}")
    said = refusal(quantised, tokens("loop_list.gelu"))
    assert "quanti" in said.lower()


class Boxed(torch.Tensor):
    """A wrapper subclass, as quantised tensors are: unpacked by whatever uses it."""

    box: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Boxed:
        shape, dtype = inner.shape, inner.dtype
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)

    def __init__(self, inner: Tensor) -> None:
        self.box = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in {torch.ops.aten.detach.default, torch.ops.aten.alias.default}:
            return cls(args[0].box)
        unbox = torch.utils._pytree.tree_map_only(Boxed, lambda boxed: boxed.box, (args, kwargs or {}))
        return func(*unbox[0], **unbox[1])


def test_tensor_subclasses_are_named() -> None:
    model = CASES["ffn.sequential"].make()
    for linear in (model[0], model[2]):
        linear.weight = nn.Parameter(Boxed(linear.weight.detach()), requires_grad=False)
    model(*tokens("ffn.sequential"))
    assert "Boxed" in refusal(model, tokens("ffn.sequential"))


@pytest.fixture
def one_rank() -> Iterator[Any]:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch without gloo")
    dist.init_process_group("gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", ["ffn.sequential", "loop_stacked.relu"])
def test_dtensors_are_named(one_rank: Any, name: str) -> None:
    from torch.distributed.tensor import Replicate, distribute_tensor

    model = CASES[name].make()
    for part in model.modules():
        for key, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, key, nn.Parameter(distribute_tensor(parameter.detach(), one_rank, [Replicate()])))
    assert "DTensor" in refusal(model)


def test_lazy_modules() -> None:
    model = nn.Sequential(nn.LazyLinear(24), nn.ReLU(), nn.LazyLinear(16))
    said = refusal(model.eval())
    assert any(word in said for word in ("Lazy", "lazy", "ninitiali"))


def test_weights_that_are_nan() -> None:
    model = CASES["loop_list.swiglu"].make()
    expert = model.experts[2]
    assert isinstance(expert, Swiglu)
    with torch.no_grad():
        expert.w1.weight[0, 0] = float("nan")
    fast = moec.compile(model, example_inputs=tokens("loop_list.swiglu", 12))
    agree(fast, model, tokens("loop_list.swiglu", 130))
