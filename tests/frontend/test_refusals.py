"""What moec does not understand is refused by name, and the model goes on working."""

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
from tests.corpus.blocks import GeluMlp, LoopList, LoopStacked, Sorted, Swiglu
from tests.corpus.case import fill, random_tokens
from tests.frontend.modules import agree, left_alone, report_of, tokens


def refusal(model: nn.Module, example: tuple[Any, ...] | None = None) -> str:
    """Everything moec says about a model of which it must compile nothing."""
    try:
        report = report_of(moec.compile(model, example_inputs=example))
    except moec.MoecError as error:
        return str(error)
    assert not [layer.name for layer in report.layers if layer.status == "compiled"]
    return "\n".join(layer.reason for layer in left_alone(report)) + "\n".join(report.notes)


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


@pytest.mark.parametrize("thing", [42, None, "no/such/file.onnx", nn.Module, [nn.Linear(2, 2)]], ids=repr)
def test_not_a_module(thing: Any) -> None:
    with pytest.raises(moec.MoecError) as caught:
        moec.compile(thing)
    assert caught.value.code.startswith("MOEC")


@pytest.mark.parametrize("model", [nn.Linear(4, 4), nn.Sequential(), nn.Conv1d(3, 3, 1), nn.LayerNorm(4)], ids=repr)
def test_a_model_without_such_layers(model: nn.Module) -> None:
    fast = moec.compile(model.eval())
    assert report_of(fast).layers == []
    assert "no MoE or FFN layer" in str(report_of(fast))


@pytest.mark.parametrize(
    "example",
    [(torch.randn(2, 3, 7),), {"x": torch.randn(2, 3, 16), "unknown": 1}, (), 3, {}],
    ids=["width", "keyword", "nothing", "number", "empty"],
)
def test_example_inputs_that_do_not_fit(example: Any) -> None:
    """A clear error that repeats what the model said; nothing changes."""
    model = CASES["loop_list.swiglu"].make()
    with pytest.raises(moec.MoecError) as caught:
        moec.compile(model, example_inputs=example)
    assert caught.value.hint or caught.value.where
    assert "forward" not in vars(model)


class Raises(LoopList):
    """Raises in the user's own code for batches of another size than the example's."""

    def forward(self, x: Tensor) -> Any:
        if x.shape[0] * x.shape[1] != 12:
            raise ZeroDivisionError("twelve tokens or nothing")
        return super().forward(x)


def test_a_module_that_raises_on_probes() -> None:
    """Left alone with the user's error in the reason, or compiled and raising as before."""
    model = Raises()
    fill(model)
    model.eval()
    twelve = (random_tokens(12, 16).view(2, 6, 16),)
    fast = moec.compile(model, example_inputs=twelve)
    agree(fast, model, twelve)
    other = random_tokens(14, 16).view(2, 7, 16)
    with pytest.raises(ZeroDivisionError):
        fast(other)
    if not any(layer.status == "compiled" for layer in report_of(fast).layers):
        assert any("twelve tokens" in layer.reason for layer in left_alone(report_of(fast)))


def test_weights_that_are_nan() -> None:
    model = CASES["loop_list.swiglu"].make()
    expert = model.experts[2]
    assert isinstance(expert, Swiglu)
    with torch.no_grad():
        expert.w1.weight[0, 0] = float("nan")
    fast = moec.compile(model, example_inputs=tokens("loop_list.swiglu", 12))
    agree(fast, model, tokens("loop_list.swiglu", 130))


class Wide(nn.Module):
    """An FFN with integer inputs: the embedding comes first, and tokens cannot be invented from its weights alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.ffn = GeluMlp(16, 24)

    def forward(self, ids: Tensor, *, offset: Tensor) -> Tensor:
        out: Tensor = self.ffn(self.embed((ids + offset) % 11))
        return out


def test_inner_layers_of_a_model_whose_inputs_are_unknown() -> None:
    """The FFN inside can be probed on its own; the whole model's inputs are only needed to check the whole."""
    model = Wide()
    fill(model)
    fast = moec.compile(model.eval())
    ids = torch.arange(22).view(2, 11) % 11
    with torch.no_grad():
        want, got = (m(ids, offset=torch.tensor(3)) for m in (model, fast))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert [(layer.kind, layer.status) for layer in report_of(fast).layers] == [("ffn", "compiled")]


class Scaled(LoopList):
    """Scales the logits by numbers written in the code."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(x)
        return weights * torch.tensor([1.0, 2.0]), ids

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weights, ids = self.route(rows)
        out = torch.zeros_like(rows)
        for e in range(self.num_experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.expert(e, rows[token]) * weights[token, slot, None])
        return out.view_as(x)


class Literal(nn.Module):
    """An FFN whose hidden values meet a tensor written in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def hidden(self, x: Tensor) -> Tensor:
        return F.silu(self.up(x)) * torch.tensor([1.0, 2.0] * 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.hidden(x))
        return y


class Normed(Literal):
    """An FFN with a norm between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)

    def hidden(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(F.silu(self.up(x)))
        return y


@pytest.mark.parametrize(
    ("model", "kind", "reason"),
    [
        (Scaled, "moe", "torch.tensor(...) of shape (2,) that the block's code makes of Python numbers"),
        (Literal, "ffn", "hidden values are mixed with a torch.tensor(...) of shape (16,)"),
        (Normed, "ffn", "hidden values are mixed with parameter 'norm.weight' by native_layer_norm"),
    ],
)
def test_what_is_mixed_in_is_named(model: type[nn.Module], kind: str, reason: str) -> None:
    (layer,) = moec.explain(model().eval()).layers
    assert (layer.kind, layer.status) == (kind, "left alone")
    assert reason in layer.reason


class WithFFN(nn.Module):
    """A shared FFN whose matrices lie in the MoE block itself."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(16, 4), nn.ModuleList(GeluMlp(16, 24) for _ in range(4))
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 16)
        weights, ids = self.router(rows).softmax(-1).topk(2)
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(rows[token]) * weights[token, slot, None])
        y: Tensor = out + self.down(F.silu(self.up(rows)))
        return y.view_as(x)


@pytest.mark.parametrize("given", [None, (torch.zeros(2, 5, 16),)])
def test_an_ffn_beside_the_experts_is_no_layer_of_its_own(given: Any) -> None:
    model = nn.Sequential(WithFFN(), WithFFN()).eval()
    report = report_of(moec.compile(model, example_inputs=given))
    assert str(report).startswith("moec: 2 of 2 layers compiled")
    assert [(layer.name, layer.kind) for layer in report.layers] == [("0", "moe"), ("1", "moe")]
    assert sum("the FFN beside the experts" in note for note in report.notes) == 2
