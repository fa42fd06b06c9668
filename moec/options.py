"""Options of moec.compile: one frozen dataclass, and one place where every value is checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from moec.errors import MoecError, did_you_mean

# name -> what is missing, or None for what works now. A name that is planned gets a better answer than "unknown".
BACKENDS: dict[str, str | None] = {
    "auto": None,
    "reference": None,
    "triton": None,
    "onnxruntime": None,
}
MODES: dict[str, str | None] = {
    "default": None,
    "reduce-overhead": None,
    "max-autotune": None,
}
QUANTIZE: dict[str, str | None] = {"int8": None}
# What is asked for and does not work yet is refused: to ignore it would be a silent change of plan.
PLANNED: dict[str, str] = {
    "mesh": "expert parallelism over a device mesh does not exist yet",
    "plan": "placement and capacity plans do not exist yet",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What moec.compile may do. Make one with Options.make, which checks every value."""

    backend: str = "auto"
    """Who runs the compiled layers: "auto", "triton", "onnxruntime" or "reference"."""
    quantize: str | None = None
    """"int8": weight-only int8, one scale per output channel and expert. Changes results."""
    mode: str = "default"
    """"reduce-overhead" captures CUDA graphs for up to some hundreds of tokens; "max-autotune" does so and
    measures first which kernels are fastest, which takes minutes. Without a GPU neither changes anything."""
    passes: str | tuple[Any, ...] | None = None
    """Passes to run instead of the default ones: pass objects, or text like "merge-gate-up,fuse-experts"."""
    training: bool = False
    """Compiled layers also serve training mode, where their code never asks for it: no dropout, no noise. Back ends
    that have kernels for gradients use them, where they are verified to be the original's."""
    inplace: bool = False
    """Change the model given instead of returning a twin that shares its tensors."""
    pack: bool = False
    """Let a back end keep a second copy of the weights in the layout it runs fastest from."""
    free_original: bool = False
    """With pack, on a GPU: experts that are a parameter each move into one piece of memory and give their own back.
    The parameters stay the same objects with the same values, for the model and its twin."""
    verify: bool = True
    """Check each layer against the original before it is replaced."""
    strict: bool = False
    """A layer left alone, and a fallback at run time, are errors."""
    measure: bool = False
    """Time each layer and the model before and after; compile times nothing otherwise."""

    @property
    def graphs(self) -> bool:
        """Whether back ends may own CUDA graphs."""
        return self.mode in ("reduce-overhead", "max-autotune")

    @property
    def tunes(self) -> bool:
        """Whether back ends may take minutes to measure which kernels are fastest."""
        return self.mode == "max-autotune"

    @classmethod
    def make(cls, **given: Any) -> Options:
        """Options from keyword arguments; MoecError (MOEC501, 502, 503) names the first that is wrong."""
        known = {field.name for field in fields(cls)}
        values = dict(given)
        for name, reason in PLANNED.items():
            if values.pop(name, None) is not None:
                raise MoecError("MOEC503", f"{name}: {reason}", hint=f"leave {name} out")
        for name in values:
            if name not in known:
                raise MoecError("MOEC501", f"unknown option {name!r}", hint=suggest(name, known))
        found = cls(**{name: _checked(name, value) for name, value in values.items()})
        if found.free_original and not found.pack:
            raise MoecError("MOEC502", "free_original=True frees what was packed", hint="pass pack=True as well")
        if found.free_original and found.quantize is not None:
            why = "an int8 copy cannot give the parameters' values back"
            raise MoecError("MOEC503", f"free_original=True with quantize: {why}", hint="leave one of them out")
        return found


def suggest(name: str, known: Iterable[str]) -> str:
    """A hint for a name that is not known: the nearest one, else all of them."""
    return did_you_mean(name.lower(), known) or "known: " + ", ".join(sorted(known))


def _checked(name: str, value: Any) -> Any:
    if name == "backend":
        return _choice(name, value, BACKENDS)
    if name == "mode":
        return _choice(name, value, MODES)
    if name == "quantize":
        return None if value is None else _choice(name, value, QUANTIZE)
    if name == "passes":
        return _passes(value)
    if not isinstance(value, bool):
        raise MoecError("MOEC502", f"{name}={value!r} must be True or False", hint=f"pass {name}=True or {name}=False")
    return value


def _choice(name: str, value: object, choices: dict[str, str | None]) -> str:
    if not isinstance(value, str) or value not in choices:
        hint = suggest(value, choices) if isinstance(value, str) else "known: " + ", ".join(choices)
        raise MoecError("MOEC502", f"{name}={value!r} is not one of {', '.join(choices)}", hint=hint)
    missing = choices[value]
    if missing is not None:
        working = ", ".join(f'"{choice}"' for choice, reason in choices.items() if reason is None)
        raise MoecError("MOEC503", f"{name}={value!r}: {missing}", hint=f"available now: {working}")
    return value


def _passes(value: object) -> str | tuple[Any, ...] | None:
    """Names are looked up where the pipeline is built; here only the shape of the value is checked."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Sequence) and all(isinstance(item, str) or callable(item) for item in value):
        return tuple(value)
    raise MoecError(
        "MOEC502",
        f"passes={value!r} must be text or a list of passes",
        hint='for example passes="merge-gate-up,fuse-experts"; `moec passes` lists them',
    )
