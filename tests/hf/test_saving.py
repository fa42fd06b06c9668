"""Copies, checkpoints and pickles of a compiled model."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import moec
from tests.hf.agreement import assert_close, assert_equal, run, told
from tests.hf.models import MODELS, compiled, eager, pair

EVERY = pytest.mark.parametrize("name", list(MODELS))


@EVERY
def test_deepcopy_is_independent(name: str) -> None:
    """The copy computes the same; writing to its weights changes the copy and nothing else."""
    original, fast = pair(name)
    inputs = MODELS[name].inputs(2, 9, seed=1)
    want = run(fast, inputs).logits
    with told():
        copied = copy.deepcopy(fast)
        assert_close(run(copied, inputs).logits, want)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.25)
    with told():
        changed = run(copied, inputs).logits
    assert not torch.allclose(changed, want, atol=1e-3)
    reference = copy.deepcopy(original)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1.25)
    assert_close(changed, run(reference, inputs).logits)
    assert_equal(run(fast, inputs).logits, want)


@EVERY
def test_state_dict_round_trip(name: str) -> None:
    model, other = MODELS[name].make(), MODELS[name].make(seed=1)
    fast = moec.compile(model, example_inputs=MODELS[name].inputs())
    inputs = MODELS[name].inputs(2, 9, seed=2)
    kept = {key: value.clone() for key, value in fast.state_dict().items()}
    assert list(kept) == list(model.state_dict())
    before = run(fast, inputs).logits
    fast.load_state_dict(other.state_dict())
    with told():
        assert_close(run(fast, inputs).logits, run(other, inputs).logits)
        assert_close(run(model, inputs).logits, run(other, inputs).logits)
    fast.load_state_dict(kept)
    with told():
        assert_close(run(fast, inputs).logits, before)


@EVERY
def test_loading_into_the_original_reaches_the_twin(name: str) -> None:
    model, other = MODELS[name].make(), MODELS[name].make(seed=2)
    fast = moec.compile(model, example_inputs=MODELS[name].inputs())
    inputs = MODELS[name].inputs(2, 9, seed=3)
    model.load_state_dict(other.state_dict())
    with told():
        assert_close(run(fast, inputs).logits, run(other, inputs).logits)


@EVERY
def test_save_pretrained_gives_the_original_class(name: str, tmp_path: Path) -> None:
    original, fast = compiled(name)
    fast.save_pretrained(tmp_path)
    loaded = type(original).from_pretrained(tmp_path, **eager(type(original))).eval()
    assert type(loaded) is type(original)
    assert not hasattr(loaded, "moec")
    inputs = MODELS[name].inputs(2, 9, seed=4)
    assert_close(run(loaded, inputs).logits, run(original, inputs).logits)
    assert_close(run(fast, inputs).logits, run(loaded, inputs).logits)


def test_save_pretrained_writes_the_same_files(tmp_path: Path) -> None:
    original, fast = compiled("mixtral")
    original.save_pretrained(tmp_path / "a")
    fast.save_pretrained(tmp_path / "b")
    left, right = (sorted(p.name for p in (tmp_path / folder).iterdir()) for folder in "ab")
    assert left == right
    for name in left:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def through(how: str, model: Any) -> Any:
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
@pytest.mark.parametrize("name", ["mixtral", "dbrx", "switch", "bert"])
def test_pickling_works_or_is_refused_with_a_hint(name: str, how: str) -> None:
    _, fast = compiled(name)
    inputs = MODELS[name].inputs(2, 9, seed=5)
    want = run(fast, inputs).logits
    refusal = None
    try:
        with told():
            loaded = through(how, fast)
    except moec.MoecError as error:
        refusal = error
    if refusal is not None:
        assert refusal.hint
        assert any(way in refusal.hint for way in ("state_dict", "restore", "save_pretrained"))
        return
    with told():
        assert_close(run(loaded, inputs).logits, want)
        with torch.no_grad():
            for parameter in loaded.parameters():
                parameter.mul_(1.25)
        changed = run(loaded, inputs).logits
    assert not torch.allclose(changed, want, atol=1e-3), "the loaded model computes with somebody else's weights"


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_the_restored_model_pickles(how: str) -> None:
    model, fast = compiled("mixtral")
    moec.restore(fast)
    inputs = MODELS["mixtral"].inputs(2, 9, seed=6)
    assert_equal(run(through(how, fast), inputs).logits, run(model, inputs).logits)


def test_the_original_still_pickles() -> None:
    model = MODELS["mixtral"].make()
    moec.compile(model, example_inputs=MODELS["mixtral"].inputs())
    inputs = MODELS["mixtral"].inputs(2, 9, seed=6)
    assert_equal(run(through("pickle", model), inputs).logits, run(model, inputs).logits)
