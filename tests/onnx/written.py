"""ONNX files as other exporters write them, of tiny models. T tokens, E experts, D model width."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.onnx import models
from tests.onnx.models import OneLayer


class Dense(nn.Module):
    """Every expert for every token, weighted by what the router scattered: x[T, 16] -> [T, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 5, bias=False)
        self.up = nn.Parameter(torch.randn(5, 16, 48) / 4)
        self.down = nn.Parameter(torch.randn(5, 24, 16) / 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2, -1)
        gates = x.new_zeros(x.shape[0], 5).scatter(1, chosen, weights / weights.sum(-1, keepdim=True))
        a, b = torch.einsum("td,edf->tef", x, self.up).chunk(2, -1)
        y = torch.einsum("tef,efd->ted", F.gelu(a) * b, self.down)
        return (y * gates.unsqueeze(-1)).sum(1)


class Capacity(nn.Module):
    """Places in a queue for each expert, as GShard and Switch write it: x[T, 16] -> [T, 16].

    The first choices of all tokens come before the second ones; a token that finds no place gets nothing.
    """

    def __init__(self, choices: int = 1, places: int = 6) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 5, bias=False)
        self.up, self.b_up = nn.Parameter(torch.randn(5, 16, 24) / 4), nn.Parameter(torch.randn(5, 1, 24) / 4)
        self.down = nn.Parameter(torch.randn(5, 24, 16) / 5)
        self.choices, self.places = choices, places

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chances = self.gate(x).softmax(-1)
        left, before, combine = chances, torch.zeros(1, 5), torch.zeros(1, 1, self.places)
        for _ in range(self.choices):
            asked = F.one_hot(left.argmax(-1), 5).float()
            place = (torch.cumsum(asked, 0) - 1 + before) * asked
            kept = asked * (place < self.places)
            spots = F.one_hot((place * kept).sum(-1).long(), self.places).float()
            combine = combine + (chances * kept).unsqueeze(-1) * spots.unsqueeze(1)
            left, before = left * (1 - asked), before + asked.sum(0, keepdim=True)
        dispatch = (combine > 0).float()
        rows = torch.einsum("tec,td->ecd", dispatch, x)
        h = torch.relu(torch.bmm(rows, self.up) + self.b_up)
        return torch.einsum("tec,ecd->td", combine, torch.bmm(h, self.down))


class Logits(nn.Module):
    """A transformers model that gives its logits alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


@contextlib.contextmanager
def quiet() -> Any:
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def by_torch(model: nn.Module, example: torch.Tensor, path: Path, name: str) -> Path:
    """torch's exporter."""
    sizes = (dict.fromkeys(range(example.dim() if not example.is_floating_point() else 1), torch.export.Dim.AUTO),)
    with quiet():
        program = torch.onnx.export(
            model.eval(), (example,), dynamo=True, dynamic_shapes=sizes, input_names=[name], verbose=False
        )
        assert program is not None
        program.save(path)
    return path


def batched(name: str, path: Path) -> Path:
    """A transformers model whose experts gather their weights, by torch's exporter."""
    model = models.model(name)
    model.set_experts_implementation("batched_mm")
    return by_torch(Logits(model), models.inputs(name)["input_ids"], path, "input_ids")


def grouped(name: str, folder: Path) -> Path:
    """A transformers model whose experts sort their rows, by transformers' exporter; its weights lie beside it."""
    from transformers.exporters import OnnxConfig, OnnxExporter

    model = models.model(name)
    model.set_experts_implementation("grouped_mm")
    with quiet():
        exported = OnnxExporter().export(
            model, {"input_ids": models.inputs(name)["input_ids"]}, config=OnnxConfig(dynamic=True)
        )
        exported.save_pretrained(folder)
    return folder / "model.onnx"


def looped(path: Path) -> Path:
    torch.manual_seed(0)
    return unrolled(OneLayer(), torch.randn(40, 16), path)


def unrolled(model: nn.Module, x: torch.Tensor, path: Path) -> Path:
    """A loop over experts, unrolled by the legacy exporter: NonZero for each expert. Opset 17, to be converted."""
    with quiet():
        torch.onnx.export(
            model.eval(), (x,), str(path), dynamo=False, input_names=["x"],
            dynamic_axes={"x": {0: "n"}}, opset_version=17,
        )  # fmt: skip
    return path


def dense(path: Path) -> Path:
    torch.manual_seed(0)
    return by_torch(Dense(), torch.randn(7, 16), path, "x")


def capacity(path: Path, choices: int = 1) -> Path:
    torch.manual_seed(choices)
    return by_torch(Capacity(choices), torch.randn(17, 16), path, "x")


def half(path: Path) -> Path:
    """All in 16 bits."""
    torch.manual_seed(0)
    return by_torch(Dense().half(), torch.randn(7, 16).half(), path, "x")


class Widened(nn.Module):
    """Weights held in bfloat16 and computed with in fp32: x[T, 16] -> [T, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = OneLayerStacked()
        self.up = nn.Parameter(self.layer.up.detach().bfloat16())
        self.down = nn.Parameter(self.layer.down.detach().bfloat16())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return gathered(self.layer.gate(x), x, self.up.float(), self.down.float())


class OneLayerStacked(nn.Module):
    """A MoE layer whose experts' weights are gathered for each slot: x[T, 16] -> [T, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 5, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(5, 48, 16) / 4), nn.Parameter(torch.randn(5, 16, 24) / 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return gathered(self.gate(x), x, self.up, self.down)


def gathered(logits: torch.Tensor, x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    weights, chosen = logits.softmax(-1).topk(2, -1)
    a, b = torch.einsum("tkfd,td->tkf", up[chosen], x).chunk(2, -1)
    y = torch.einsum("tkdf,tkf->tkd", down[chosen], F.silu(a) * b)
    return (y * weights.unsqueeze(-1)).sum(1)


def widened(path: Path) -> Path:
    torch.manual_seed(0)
    return by_torch(Widened(), torch.randn(7, 16), path, "x")


class DenseSilu(Dense):
    """As ONNX Runtime's MoE has it: gated by silu, gate and up in turns, weights renormalised."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        best, chosen = self.gate(x).topk(2, -1)
        gates = x.new_zeros(x.shape[0], 5).scatter(1, chosen, best.softmax(-1))
        h = torch.einsum("td,edf->tef", x, self.up)
        y = torch.einsum("tef,efd->ted", F.silu(h[..., 0::2]) * h[..., 1::2], self.down)
        return (y * gates.unsqueeze(-1)).sum(1)


def dense_silu(path: Path) -> Path:
    torch.manual_seed(0)
    return by_torch(DenseSilu(), torch.randn(7, 16), path, "x")
