"""The MODEL argument: what is taken, and one clear error for everything else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from moec.errors import MoecError
from moec.loading import load_model

FACTORIES = """
import neighbour
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).train()

def with_inputs():
    return model(), lambda tokens: torch.ones(tokens, 4)

def with_keywords():
    return model(), lambda tokens: {"x": torch.ones(tokens, 4)}

def with_wrong_inputs():
    return model(), lambda tokens: "eight"

def with_failing_inputs():
    return model(), lambda tokens: torch.ones(tokens, -1)

def inputs_not_callable():
    return model(), 3

def raises():
    raise RuntimeError("no weights today\\nsecond line")

def needs_arguments(size):
    return nn.Linear(size, size)

def gives_text():
    return "a model"

number = 3
ready = nn.Linear(4, 4)
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))  # restores sys.path afterwards
    (tmp_path / "neighbour.py").write_text("x = 1\n")
    path = tmp_path / "factories.py"
    path.write_text(FACTORIES)
    return path


def fails(spec: str, code: str) -> MoecError:
    with pytest.raises(MoecError) as caught:
        load_model(spec)
    assert caught.value.code == code, str(caught.value)
    assert caught.value.hint
    return caught.value


def test_a_factory_gives_a_model_in_eval_mode(file: Path) -> None:
    loaded = load_model(f"{file}:model")
    assert isinstance(loaded.model, nn.Sequential)
    assert not loaded.model.training
    assert loaded.make_inputs is None
    assert loaded.source == f"{file}:model"


def test_a_factory_gives_inputs_too(file: Path) -> None:
    loaded = load_model(f"{file}:with_inputs")
    assert loaded.make_inputs is not None
    inputs = loaded.make_inputs(3)
    assert isinstance(inputs, tuple)
    assert [x.shape for x in inputs] == [(3, 4)]
    keywords = load_model(f"{file}:with_keywords").make_inputs
    assert keywords is not None
    assert set(keywords(3)) == {"x"}


def test_a_module_is_as_good_as_a_factory(file: Path) -> None:
    assert isinstance(load_model(f"{file}:ready").model, nn.Linear)


def test_dtype_is_applied(file: Path) -> None:
    loaded = load_model(f"{file}:model", dtype="bfloat16")
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("modle", "MOEC603", 'did you mean "model"?'),
        ("zzz", "MOEC603", "it has: model, with_inputs"),
        ("number", "MOEC603", "is of type int, neither a function nor a module"),
        ("raises", "MOEC603", "raises() failed: RuntimeError: no weights today"),
        ("needs_arguments", "MOEC603", "TypeError"),
        ("gives_text", "MOEC603", "gave an object of type str, not a torch.nn.Module"),
        ("inputs_not_callable", "MOEC603", "make_inputs is of type int, not a function"),
    ],
)
def test_factories_that_give_no_model(file: Path, name: str, code: str, says: str) -> None:
    error = fails(f"{file}:{name}", code)
    assert says in str(error)
    assert "second line" not in error.message


def test_the_line_that_raised_is_named(file: Path) -> None:
    error = fails(f"{file}:raises", "MOEC603")
    assert error.where is not None
    assert error.where.startswith(f"{file}:")
    assert "raise RuntimeError" in error.where


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("with_wrong_inputs", "MOEC605", "make_inputs(8) of"),
        ("with_failing_inputs", "MOEC603", "RuntimeError"),
    ],
)
def test_inputs_that_are_none(file: Path, name: str, code: str, says: str) -> None:
    make_inputs = load_model(f"{file}:{name}").make_inputs
    assert make_inputs is not None
    with pytest.raises(MoecError) as caught:
        make_inputs(8)
    assert caught.value.code == code
    assert says in str(caught.value)


def test_files_that_cannot_be_imported(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("x = 1\ndef f(:\n    pass\n")
    error = fails(f"{path}:f", "MOEC603")
    assert "SyntaxError" in str(error)
    assert error.where == f"{path}:2: def f(:"
    path.write_text("import no_such_module_anywhere\n")
    assert "ModuleNotFoundError" in str(fails(f"{path}:f", "MOEC603"))
    fails(f"{tmp_path / 'absent.py'}:f", "MOEC601")


def test_paths_that_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    (tmp_path / "weights.gguf").write_bytes(b"")
    (tmp_path / "model.py").write_text("")
    assert "does not read ONNX files yet" in str(fails(str(tmp_path / "model.onnx"), "MOEC602"))
    assert "not a kind of model" in str(fails(str(tmp_path / "weights.gguf"), "MOEC602"))
    assert "model.py:build_model" in str(fails(str(tmp_path / "model.py"), "MOEC602"))
    assert "moec downloads nothing" in str(fails("mistralai/Mixtral-8x7B", "MOEC601"))
    assert "has no config.json" in str(fails(str(tmp_path), "MOEC601"))


@pytest.mark.parametrize(
    "config", ["{", "{}", '{"model_type": "no-such-type"}', '{"model_type": "mixtral", "num_experts_per_tok": "x"}']
)
def test_configurations_that_are_broken(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    assert str(tmp_path) in str(fails(str(tmp_path), "MOEC604"))


TINY = {
    "model_type": "mixtral",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "vocab_size": 50,
}


@pytest.mark.parametrize("architectures", [None, ["MixtralForCausalLM"], ["MixtralModel"]])
def test_a_config_folder_gives_a_model_with_random_weights(tmp_path: Path, architectures: list[str] | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "architectures": architectures}))
    before = torch.get_default_dtype()
    loaded = load_model(str(tmp_path), dtype="bfloat16")
    assert torch.get_default_dtype() == before
    assert type(loaded.model).__name__ == (architectures or ["MixtralForCausalLM"])[0]
    assert next(loaded.model.parameters()).dtype == torch.bfloat16
    assert "no weights there: random ones" in loaded.source
    assert loaded.make_inputs is not None
    inputs = loaded.make_inputs(7)
    assert isinstance(inputs, dict)
    assert inputs["input_ids"].shape == (1, 7)
    assert int(inputs["input_ids"].max()) < 50
    with torch.no_grad():
        loaded.model(**inputs)


def test_a_checkpoint_folder_gives_its_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    first = load_model(str(tmp_path))
    with torch.no_grad():
        next(first.model.parameters()).fill_(0.25)
    first.model.save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    again = load_model(str(tmp_path / "saved" / "config.json"))
    assert "random" not in again.source
    assert bool((next(again.model.parameters()) == 0.25).all())


def test_a_damaged_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    fails(str(tmp_path), "MOEC604")
