"""Dense mixtures at run time: modes, statistics, gradients, copies; what is a mixture at all; ids among features."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.errors import MoecError
from tests.corpus import CASES
from tests.corpus.case import fill
from tests.corpus.multitask import BatchNormInside, Gates, Levels, Tower
from tests.frontend.compare import relative


def made(cls: type[nn.Module]) -> Any:
    """(original, compiled) of the same weights; Any, as each class has its own attributes."""
    torch.manual_seed(0)
    model = cls().eval()
    fill(model)
    return model, moec.compile(model)


def rows(count: int = 9) -> Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(count))


def statistics(model: nn.Module) -> Tensor:
    return torch.cat([b.flatten() for n, b in model.named_buffers() if "running" in n])


@pytest.fixture(scope="module")
def normed() -> Any:
    return made(BatchNormInside)


def test_training_mode_is_the_original(normed: Any) -> None:
    twin = copy.deepcopy(normed[1])
    other = copy.deepcopy(normed[0]).train()
    twin.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        got = twin(rows())
        torch.manual_seed(1)
        want = other(rows())
    assert torch.equal(got, want)
    assert torch.equal(statistics(twin), statistics(other))
    assert twin.moec.report.layers[0].fallback_reasons == {"the layer is in training mode": 1}
    twin.eval()
    assert max(relative(twin(rows()), other.eval()(rows()))) <= 2e-6, "the statistics that training left are used"


def test_one_norm_in_training_mode_is_enough() -> None:
    _, twin = made(BatchNormInside)
    twin.experts[2].norms[0].train()
    with pytest.warns(UserWarning, match="training mode"):
        twin(rows())


def test_gradients_are_the_originals(normed: Any) -> None:
    grads = []
    for model in normed:
        weights = [p for p in model.parameters() if p.requires_grad]
        grads.append(torch.autograd.grad(model(rows()).square().sum(), weights, allow_unused=True))
    for mine, theirs in zip(*grads, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or max(relative(mine, theirs)) <= 1e-5


def test_a_copy_has_its_own_statistics(normed: Any) -> None:
    twin = copy.deepcopy(normed[1])
    twin.experts[0].norms[0].running_mean.add_(1.0)
    same = copy.deepcopy(normed[0])
    same.experts[0].norms[0].running_mean.add_(1.0)
    assert max(relative(twin(rows()), same(rows()))) <= 2e-6
    assert max(relative(normed[1](rows()), normed[0](rows()))) <= 2e-6


def test_low_precision_is_no_worse_than_the_original() -> None:
    model = CASES["multitask.levels"].make().bfloat16()
    fast = moec.compile(model)
    assert [layer.status for layer in fast.moec.report.layers] == ["compiled"]


def test_levels_are_named_and_the_ir_has_both() -> None:
    _, fast = made(Levels)
    (layer,) = fast.moec.report.layers
    assert any(line.startswith("level 1: 5 experts") and "the same rows" in line for line in layer.evidence)
    assert any(line.startswith("level 2: 5 experts") and "3 tensors of rows" in line for line in layer.evidence)
    assert layer.ir_after.count("expert_ffn") == 2
    assert "T2" in layer.ir_before


def test_no_rows_and_strided_rows() -> None:
    model, fast = made(Gates)
    assert fast(rows(0)).shape == model(rows(0)).shape
    wide = torch.randn(16, 7).t()
    assert max(relative(fast(wide), model(wide))) <= 2e-6


class Side(Gates):
    """Each expert's result goes into a layer of its own; only then are they weighed."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        done = [own(expert(x)) for own, expert in zip(self.own, self.experts, strict=True)]
        first: Any = self.gates[0]
        mixed = torch.einsum("te,ted->td", first(x).softmax(-1), torch.stack(done, 1))
        out: Tensor = self.towers[0](mixed)
        return out


def test_layers_behind_a_tower_belong_to_the_experts() -> None:
    model, fast = made(Side)
    (layer,) = (one for one in fast.moec.report.layers if one.kind == "moe")
    assert layer.status == "compiled"
    assert any("3 experts" in line and "relu; relu" in line for line in layer.evidence), layer.evidence
    assert max(relative(fast(rows()), model(rows()))) <= 2e-6


class Heads(nn.Module):
    """Heads that look at each other's results: a product of results is no gate."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Tower(16, 24, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        left, right = (head(x) for head in self.heads)
        out: Tensor = left * right
        return out


def test_products_of_results_are_no_gates() -> None:
    _, fast = made(Heads)
    assert all(layer.status == "left alone" for layer in fast.moec.report.layers if layer.kind == "moe")


class Fields(Gates):
    """The first column is an id, which is looked up; the others are numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.cat([self.table(x[:, 0].long()), x[:, 1:]], 1))


def test_ids_among_the_features_keep_to_what_was_seen() -> None:
    torch.manual_seed(0)
    model = Fields().eval()
    fill(model)
    x = torch.cat([torch.randint(0, 5, (40, 1)).float(), torch.randn(40, 12)], 1)
    fast = moec.compile(model, example_inputs=(x,))
    (layer,) = fast.moec.report.layers
    assert layer.status == "compiled", layer.reason
    assert len(layer.probes) > 10
    assert max(relative(fast(x[:7]), model(x[:7]))) <= 2e-6
    alone = moec.explain(model)
    assert all(layer.status == "left alone" for layer in alone.layers)


def test_an_export_says_that_it_leaves_them_as_they_are(tmp_path: Path) -> None:
    model, _ = made(Gates)
    with pytest.raises(MoecError, match=r"MOEC705.*are not exported"):
        moec.export(model, tmp_path / "model.onnx", example_inputs=(rows(),))
    assert not list(tmp_path.iterdir())
