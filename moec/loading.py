"""The command line's MODEL: a transformers config or checkpoint folder, or module.py:factory, becomes a module."""

from __future__ import annotations

import difflib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from moec.errors import MoecError

if TYPE_CHECKING:
    from torch import dtype as Dtype
    from torch import nn

Inputs = tuple[Any, ...] | Mapping[str, Any]
MakeInputs = Callable[[int], Inputs]

DTYPES = ("float32", "bfloat16", "float16")
FORMS = "give a transformers config or checkpoint folder, or module.py:factory"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode and how to make its inputs for a number of tokens, where that is known."""

    model: nn.Module
    make_inputs: MakeInputs | None
    source: str
    """In words, for reports: where it came from and whether its weights are random."""


def load_model(spec: str, *, dtype: str | None = None) -> Loaded:
    """The model that spec names; MOEC601 to 604 say what is wrong with it. Nothing is ever downloaded."""
    file, _, factory = spec.rpartition(":")
    if file.endswith(".py"):
        return _from_factory(Path(file), factory, _dtype(dtype))
    path = Path(spec)
    if path.suffix == ".py":
        hint = f"name the function or module in it: {spec}:build_model"
        raise MoecError("MOEC602", f"{spec} names a Python file but nothing in it", hint=hint)
    if path.suffix == ".onnx":
        raise MoecError("MOEC602", f"{spec}: moec does not read ONNX files yet", hint=FORMS)
    if not path.exists():
        raise MoecError("MOEC601", f"{spec}: no such file or folder", hint=f"{FORMS}; moec downloads nothing")
    if path.is_file() and path.name != "config.json":
        raise MoecError("MOEC602", f"{spec} is not a kind of model that moec knows", hint=FORMS)
    return _from_transformers(path.parent if path.is_file() else path, _dtype(dtype))


def _dtype(name: str | None) -> Dtype | None:
    if name is None:
        return None
    import torch

    found: Dtype = getattr(torch, name)
    return found


# --- transformers -----------------------------------------------------------------------------------------------------


def _from_transformers(folder: Path, dtype: Dtype | None) -> Loaded:
    if not (folder / "config.json").is_file():
        raise MoecError("MOEC601", f"{folder} has no config.json", hint=FORMS)
    try:
        import transformers
    except ImportError as error:
        hint = "pip install 'moec[hf]'"
        raise MoecError("MOEC604", f"{folder}: a transformers model needs transformers", hint=hint) from error
    import torch

    trained = any(True for pattern in WEIGHTS for _ in folder.glob(pattern))
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        kind = _model_class(transformers, config)
        if trained:
            model = kind.from_pretrained(folder, local_files_only=True, dtype=dtype or "auto")
        else:
            torch.manual_seed(0)
            model = _with_dtype(dtype or torch.float32, lambda: kind(config))
    except MoecError:
        raise
    except Exception as error:  # whatever transformers raises on a broken folder, the folder is what to look at
        raise MoecError("MOEC604", f"{folder}: {_first_line(error)}", hint="transformers could not load it") from error
    source = f"{kind.__name__} from {folder}" + ("" if trained else " (no weights there: random ones)")
    return Loaded(model.eval(), token_inputs(model), source)


def _model_class(transformers: ModuleType, config: Any) -> Any:
    """The class the configuration names, else the first automatic one that takes it."""
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    for auto in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModel"):
        mapping = getattr(transformers, auto)._model_mapping
        if type(config) in mapping:
            return mapping[type(config)]
    raise MoecError("MOEC604", f"no model class for {type(config).__name__}", hint="name one under architectures")


def _with_dtype(dtype: Dtype, build: Callable[[], Any]) -> Any:
    """Build with parameters of dtype from the start, so that a large model never exists in float32 first."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return build()
    finally:
        torch.set_default_dtype(before)


def token_inputs(model: nn.Module) -> MakeInputs | None:
    """For a transformers model that reads token ids: tokens -> its keyword arguments with ids [1, tokens]."""
    config = getattr(model, "config", None)
    if getattr(model, "main_input_name", None) != "input_ids" or not hasattr(config, "get_text_config"):
        return None
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)  # type: ignore[union-attr]
    if vocabulary is None:
        return None
    decoder = bool(getattr(config, "is_encoder_decoder", False))

    def make(tokens: int) -> dict[str, Any]:
        import torch

        generator = torch.Generator().manual_seed(tokens)
        ids = torch.randint(0, vocabulary, (1, tokens), generator=generator)
        ids = ids.to(next(model.parameters()).device)
        return {"input_ids": ids, "decoder_input_ids": ids} if decoder else {"input_ids": ids}

    return make


# --- module.py:factory ------------------------------------------------------------------------------------------------


def _from_factory(path: Path, name: str, dtype: Dtype | None) -> Loaded:
    module = _import_file(path)
    made = _call(path, name, _attribute(module, path, name))
    model, make_inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    from torch import nn

    if not isinstance(model, nn.Module):
        what = f"{path}:{name} gave an object of type {type(model).__name__}, not a torch.nn.Module"
        raise MoecError("MOEC603", what, hint="return the model, or (model, make_inputs)")
    if make_inputs is not None and not callable(make_inputs):
        what = f"{path}:{name}: make_inputs is of type {type(make_inputs).__name__}, not a function"
        raise MoecError("MOEC603", what, hint="make_inputs(tokens) returns a tuple of arguments or a dict of keywords")
    model = model.eval() if dtype is None else model.eval().to(dtype)
    return Loaded(model, _checked(make_inputs, f"{path}:{name}") or token_inputs(model), f"{path}:{name}")


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise MoecError("MOEC601", f"{path}: no such file", hint=FORMS)
    spec = importlib.util.spec_from_file_location(f"moec_model_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a class's module up there
    sys.path.insert(0, str(path.parent.resolve()))  # the file may import its neighbours, as when it is run
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise _user_error(path, f"{path} could not be imported", error) from error
    return module


def _attribute(module: ModuleType, path: Path, name: str) -> Any:
    if hasattr(module, name):
        return getattr(module, name)
    own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    near = difflib.get_close_matches(name, own, n=1)
    hint = f'did you mean "{near[0]}"?' if near else "it has: " + (", ".join(own) or "nothing callable")
    raise MoecError("MOEC603", f"{path} has no {name!r}", hint=hint)


def _call(path: Path, name: str, factory: Any) -> Any:
    from torch import nn

    if isinstance(factory, nn.Module):
        return factory
    if not callable(factory):
        what = f"{path}:{name} is of type {type(factory).__name__}, neither a function nor a module"
        raise MoecError("MOEC603", what, hint="name a function without arguments that returns the model")
    try:
        return factory()
    except Exception as error:
        raise _user_error(path, f"{path}:{name}() failed", error) from error


def _checked(make_inputs: Any, name: str) -> MakeInputs | None:
    """make_inputs with what it returns checked: a tensor alone is taken as the one argument."""
    if make_inputs is None:
        return None

    def make(tokens: int) -> Inputs:
        import torch

        try:
            made = make_inputs(tokens)
        except Exception as error:
            raise _user_error(Path(name), f"make_inputs({tokens}) of {name} failed", error) from error
        if isinstance(made, torch.Tensor):
            return (made,)
        if isinstance(made, (tuple, dict)):
            return made
        what = f"make_inputs({tokens}) of {name} gave an object of type {type(made).__name__}"
        raise MoecError("MOEC605", what, hint="return a tensor, a tuple of arguments or a dict of keywords")

    return make


def _user_error(path: Path, what: str, error: Exception) -> MoecError:
    """The error of a user's file: its own words and the line in that file, not our traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    stem = str(path).partition(":")[0]
    lines = [f"{stem}:{frame.lineno}: {frame.line}" for frame in frames if Path(frame.filename).name == Path(stem).name]
    if isinstance(error, SyntaxError):
        lines = [f"{error.filename}:{error.lineno}: {(error.text or '').strip()}"]
    where = lines[-1] if lines else None
    hint = "--debug shows the whole traceback"
    return MoecError("MOEC603", f"{what}: {type(error).__name__}: {_first_line(error)}", where=where, hint=hint)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
