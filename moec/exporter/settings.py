"""What an export may do, with every value checked in one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moec.errors import MoecError
from moec.options import suggest

TARGETS = ("portable", "cpu", "cuda")
QUANTIZE = ("int8", "int4")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of moec.export."""

    path: Path
    target: str = ""
    """"portable": ONNX's own ops alone. "cpu" and "cuda" may use those that ONNX Runtime has there. By itself "cuda"
    where its CUDA provider loads, else "cpu"."""
    quantize: str | None = None
    """"int8": int8 weights, and rows rounded to int8 as they come. "int4": in ONNX Runtime's own QMoE alone."""
    tokens: tuple[int, ...] = ()
    """Numbers of tokens to time before and after at; none by default."""
    tune: bool = False
    """Where several ways to write a layer are rivals, measure them at `tokens` instead of asking a model of cost."""
    static: bool = False
    """Every size in the file is a number, that of example_inputs."""
    external_data: bool | None = None
    """Weights in a file beside the model; by itself above 2 GB only."""
    inputs: Path | None = None
    """For an ONNX file: an .npz file with an array for each of its inputs, where they cannot be made up."""
    widen: bool = False
    """For an ONNX file that computes in bf16: read and write it in fp32, inputs and outputs too."""
    seconds: float = 1.0
    """Time for each pair of latencies."""

    @classmethod
    def make(cls, path: Any, **given: Any) -> Settings:
        """Settings from keyword arguments; MOEC501 and MOEC502 name the first that is wrong."""
        for name in given:
            if name not in cls.__dataclass_fields__:
                raise MoecError("MOEC501", f"unknown option {name!r}", hint=suggest(name, cls.__dataclass_fields__))
        if not isinstance(path, str | Path):
            raise MoecError(
                "MOEC502", f"path={path!r} must be a file name", hint='moec.export(model, "model.onnx", ...)'
            )
        if given.get("inputs") is not None:
            given["inputs"] = Path(given["inputs"])
        given = {**given, "path": Path(path), "tokens": _tokens(given.get("tokens") or ())}
        if given.get("target") is None:
            given["target"] = default_target()
        _choice("target", given["target"], TARGETS)
        if given.get("quantize") is not None:
            _choice("quantize", given["quantize"], QUANTIZE)
        if given.get("quantize") == "int4" and given["target"] == "portable":
            hint = 'quantize="int8", or target="cpu" or "cuda"'
            raise MoecError("MOEC502", "int4 is computed by ONNX Runtime's own QMoE, which is not portable", hint=hint)
        for name in ("tune", "static", "external_data", "widen"):
            if given.get(name) not in (None, True, False):
                raise MoecError("MOEC502", f"{name}={given[name]!r} must be True or False", hint=f"{name}=True")
        return cls(**given)


def default_target() -> str:
    """ "cuda" where ONNX Runtime's CUDA provider loads, else "cpu"."""
    from moec.backends.onnx.providers import why_no_cuda

    return "cpu" if why_no_cuda() else "cuda"


def _choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        hint = suggest(value, choices) if isinstance(value, str) else "known: " + ", ".join(choices)
        raise MoecError("MOEC502", f"{name}={value!r} is not one of {', '.join(choices)}", hint=hint)


def _tokens(given: Any) -> tuple[int, ...]:
    if not isinstance(given, Sequence) or isinstance(given, str) or not all(map(_positive, given)):
        raise MoecError("MOEC502", f"tokens={given!r} must be positive whole numbers", hint="tokens=[1, 32, 256]")
    return tuple(given)


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
