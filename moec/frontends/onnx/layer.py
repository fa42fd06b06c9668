"""What reading an ONNX graph gives: proved layers, and candidates that are left alone.

T tokens, K experts per token, E experts, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moec.frontends.onnx.store import FileWeights
from moec.ir import Region

Feeds = Sequence[Mapping[str, Any]]
Run = Mapping[str, Any]
"""Arrays by name: the inputs and the recorded values of one run of a graph."""
Form = Literal["slots", "gates", "places", "logits", "dense"]
"""How a layer is told which experts a token gets.

slots: a weight for each choice, [T, K], or none where every weight is 1.
gates: a weight for every expert, [T, E]; 0 means that the token is not the expert's.
places: a weight for every place of every expert, [T, E, C].
logits: the scores of an op that routes by itself, [T, E].
dense: not at all, there is one expert.
"""


DTYPES = {"float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16"}


def element(run: Run, value: Any) -> str:
    """The element type of a value in the IR's words; a graph does not always say it."""
    return DTYPES[str(run[value.name].dtype)]


@dataclass(frozen=True)
class Router:
    """What an op that takes logits does with them: softmax, the K largest, and their weights over all or over those."""

    k: int
    normalize: bool


@dataclass(frozen=True)
class Layer:
    """A proved layer: the values of the graph that it reads, the one it gives, and its region."""

    name: str
    region: Region
    weights: FileWeights
    x: Any
    y: Any
    ids: tuple[Any, ...] = ()
    """The chosen experts; of several choices, [T, 1] or [T] each."""
    routing: Any = None
    form: Form = "slots"
    router: Router | None = None
    evidence: tuple[str, ...] = ()
    alike: tuple[tuple[Any, Any], ...] = ()
    """x and routing, and pairs of values that were equal to them in every run: y may be computed from any of these."""
    scores: Any = None
    """What the experts are chosen by, in front of the first choice."""
    bar: float = 0.0
    """How far the original itself may be off, where it rounds."""
    doubt: str = ""
    """A defect of some releases of ONNX Runtime that the original meets, with its name in brackets."""
    kept: str = ""
    """Why the layer stays as it is unless something else is asked for."""

    @property
    def kind(self) -> str:
        return "ffn" if self.form == "dense" else "moe"

    @property
    def k(self) -> int:
        """K; 1 of a dense layer."""
        return self.region.inputs[1].type.shape[1].evaluate({}) if len(self.region.inputs) == 3 else 1

    @property
    def width(self) -> int:
        """D."""
        return self.region.inputs[0].type.shape[-1].evaluate({})

    @property
    def experts(self) -> int:
        """E."""
        return 1 if self.form == "dense" else len(self.weights.experts("w_in"))


@dataclass(frozen=True)
class Left:
    """A candidate that is left alone, and why."""

    name: str
    reason: str
    kind: str = "moe"
