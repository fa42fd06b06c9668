"""Packed copies of scattered experts, and parameters that move together instead."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

pytest.importorskip("triton")

import moec
from moec.backendbase import load_backend
from moec.compiler import Compiled, compile_layer
from moec.errors import MoecError
from moec.gathered import gather_experts
from tests.backends.running import Weights
from tests.backends.triton.test_backend import assert_same, experts, weights_for
from tests.frontend.test_training_mode import Block, D, Ffn


class Wide(Block):
    """Its matrices are too large for the copy of the model that probes run on: that one shares them."""

    def __init__(self) -> None:
        super().__init__()
        for expert in self.experts:
            expert.up, expert.down = nn.Linear(D, 96), nn.Linear(96, D)


def scatter(params: list[nn.Parameter]) -> None:
    """Memory of their own for parameters that does not lie evenly, however the allocator went."""
    memory = [p.data.clone() for p in params]
    order = [e ^ 1 if e + 1 < len(params) or e % 2 else e for e in range(len(params))]
    for p, e in zip(params, order, strict=True):
        p.data = memory[e].copy_(p.data)


LAYER: dict[str, Any] = {"backend": "triton", "pack": True, "free_original": True}


def scattered(layout: str, device: torch.device) -> Weights:
    """Weights of one tensor for each expert, which lie unevenly."""
    found = weights_for(layout, separate=True, device=device)
    for ref in found.views:
        scatter([found.params[f"{ref}_{e}"] for e in range(5)])
    return found


@pytest.mark.parametrize("layout", ["one", "pair", "joined"])
def test_scattered_experts_are_copied_together(layout: str, device: torch.device) -> None:
    weights = scattered(layout, device)
    region = experts(layout)
    mine = load_backend("triton").build(region, weights.store(), {}, pack=True)
    theirs = load_backend("reference").build(region, weights.store(), {})
    size = sum(p.nbytes for p in weights.params.values())
    assert mine.nbytes_packed == size
    assert f"packed: {size:,} bytes" in mine.describe()
    assert_same(mine, theirs, 3, device)
    name = next(iter(weights.params))
    with torch.no_grad():
        weights.params[name].mul_(2)  # noticed
    assert_same(mine, theirs, 3, device)
    assert_same(mine, theirs, 3, device)
    weights.params[name].data.mul_(3)  # behind torch's back
    mine.refresh()
    assert_same(mine, theirs, 3, device)
    setattr(weights.module, name, nn.Parameter(torch.randn_like(weights.params[name]), requires_grad=False))
    assert_same(mine, theirs, 2, device)
    assert mine.nbytes_packed == size


def test_what_lies_evenly_is_not_copied(device: torch.device) -> None:
    weights = weights_for("one", separate=False, device=device)
    mine = load_backend("triton").build(experts("one"), weights.store(), {}, pack=True)
    assert mine.nbytes_packed == 0


def places(model: nn.Module) -> dict[str, int]:
    return {name: p.untyped_storage().data_ptr() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def freed() -> tuple[nn.Module, Any, dict[str, torch.Tensor], list[StorageWeakRef]]:
    """A model, its twin compiled with free_original, its values before, and its old memory."""
    torch.manual_seed(0)
    model = Wide().eval().to("cuda" if torch.cuda.is_available() else "cpu")
    for role in ("up.weight", "up.bias", "down.weight", "down.bias"):
        scatter([p for name, p in model.named_parameters() if name.endswith(role)])
    before = {name: t.detach().clone() for name, t in model.state_dict().items()}
    old = [StorageWeakRef(p.untyped_storage()) for name, p in model.named_parameters() if name.endswith("up.weight")]
    seen: list[bool] = []

    def spy(*args: Any) -> Compiled:
        seen.append(all(ref.expired() for ref in old))
        return compile_layer(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moec.freeing.compile_layer", spy)
        fast = moec.compile(model, **LAYER)
    assert seen == [True], "the old memory was held while the layer was compiled"
    return model, fast, before, old


Freed = tuple[nn.Module, Any, dict[str, torch.Tensor], list[StorageWeakRef]]


def test_parameters_move_and_keep_everything_else(freed: Freed, device: torch.device) -> None:
    model, fast, before, old = freed
    (layer,) = fast.moec.report.layers
    assert layer.compiled, layer.reason
    own = dict(model.named_parameters())
    assert all(p is own[name] for name, p in fast.named_parameters())
    for one in (model, fast):
        assert all(torch.equal(t, before[name]) for name, t in one.state_dict().items())
        assert all(p.is_contiguous() and p.requires_grad and p.is_leaf for p in one.parameters())
    for role in ("up.weight", "up.bias", "down.weight", "down.bias"):
        assert len({at for name, at in places(model).items() if name.endswith(role)}) == 1, role
    assert all(ref.expired() for ref in old)
    x = torch.randn(7, D, device=device)
    with torch.no_grad():
        assert torch.allclose(fast(x), model(x), atol=1e-5)


def test_what_the_report_says_of_bytes(freed: Freed) -> None:
    (layer,) = freed[1].moec.report.layers
    size = sum(p.nbytes for name, p in freed[0].named_parameters() if "experts" in name)
    assert layer.bytes_before == layer.bytes_after == size
    largest = max(
        sum(p.nbytes for n, p in freed[0].named_parameters() if n.endswith(end)) for end in ("up.weight", "down.weight")
    )
    assert layer.bytes_peak == size + largest
    assert any(
        line.startswith(f"{size:,} bytes of experts' parameters were brought together") for line in layer.evidence
    )


def test_writes_are_seen_at_once(freed: Freed, device: torch.device) -> None:
    model, fast, *_ = freed
    x = torch.randn(5, D, device=device)
    with torch.no_grad():
        for p in model.parameters():
            p.data.mul_(1.1)  # no copy that could be stale
        assert torch.allclose(fast(x), model(x), atol=1e-5)
        for p in model.parameters():
            p.mul_(1 / 1.1)
        assert torch.allclose(fast(x), model(x), atol=1e-5)
    fast.load_state_dict(model.state_dict())
    assert fast.moec.report.layers[0].fallbacks == 0


def test_copies_pickles_and_files(freed: Freed, device: torch.device, tmp_path: Path) -> None:
    model, fast, *_ = freed
    x = torch.randn(5, D, device=device)
    with torch.no_grad():
        wanted = model(x)
        assert torch.allclose(copy.deepcopy(fast)(x), wanted, atol=1e-5)
        assert torch.allclose(pickle.loads(pickle.dumps(fast))(x), wanted, atol=1e-5)
    file = io.BytesIO()
    torch.save(fast.state_dict(), file)
    assert file.tell() < 2 * sum(p.nbytes for p in model.parameters()) + 40_000
    file.seek(0)
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in torch.load(file, map_location=device).items())
    save_file(fast.state_dict(), tmp_path / "model.safetensors")
    written = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(t.cpu(), written[name]) for name, t in model.state_dict().items())


def test_an_optimizer_goes_on(freed: Freed, device: torch.device) -> None:
    model, fast, *_ = freed
    x = torch.randn(5, D, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    fast(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        assert torch.allclose(fast(x), model(x), atol=1e-5)


@pytest.mark.slow
def test_a_layer_without_lists_stays(device: torch.device) -> None:
    model = Ffn().eval().to(device)
    before = places(model)
    fast = moec.compile(model, **LAYER)
    (layer,) = fast.moec.report.layers
    assert "no experts' parameters had to be brought together" in layer.evidence
    assert layer.bytes_peak == layer.bytes_after == layer.bytes_before
    assert places(fast) == before


def test_shared_memory_stays(device: torch.device) -> None:
    weights = scattered("pair", device)
    first = weights.params["gate_0"]
    other = nn.Parameter(torch.empty(0, device=device))
    other.data = first.data
    found = gather_experts(weights.store(), [*weights.params.values(), other])
    assert found.left == ("'gate' stays where it is: their memory is shared with other tensors",)
    assert found.moved == sum(p.nbytes for name, p in weights.params.items() if not name.startswith("gate"))
    assert other.data_ptr() == first.data_ptr()
    assert not gather_experts(weights.store(), weights.params.values()).left


def test_parts_of_one_memory_stay(device: torch.device) -> None:
    weights = scattered("one", device)
    whole = torch.randn(3, *weights.params["both_0"].shape, device=device)
    weights.params["both_1"].data = whole[1]
    found = gather_experts(weights.store(), weights.params.values())
    assert found.left == ("'both' stays where it is: their memory is shared with other tensors",)
    assert weights.params["both_1"].data_ptr() == whole[1].data_ptr()


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ({"backend": "triton", "free_original": True}, "MOEC502", "frees what was packed"),
        ({**LAYER, "quantize": "int8"}, "MOEC503", "cannot give the parameters' values back"),
        ({**LAYER, "backend": "reference"}, "MOEC503", "layouts that no parameter can have"),
        ({**LAYER, "backend": "onnxruntime"}, "MOEC503", "layouts that no parameter can have"),
    ],
)
def test_refusals(options: dict[str, Any], code: str, says: str) -> None:
    model = Block().eval()
    before = places(model)
    with pytest.raises(MoecError, match=says) as caught:
        moec.compile(model, **options)
    assert caught.value.code == code
    assert places(model) == before


@pytest.mark.slow
def test_explain_moves_nothing(device: torch.device) -> None:
    model = Block().eval().to(device)
    before = places(model)
    report = moec.explain(model, **LAYER)
    assert report.layers[0].compiled
    assert places(model) == before
    with pytest.raises(MoecError, match="frees what was packed"):
        moec.explain(model, backend="triton", free_original=True)
