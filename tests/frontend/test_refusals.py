"""What moec does not understand is refused by name, and the model goes on working."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moec
from tests.corpus import CASES
from tests.corpus.blocks import GeluMlp, LoopList
from tests.corpus.case import fill, random_tokens
from tests.frontend.modules import agree, left_alone, report_of


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
