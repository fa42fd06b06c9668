"""ONNX Runtime's own MoE and QMoE nodes as layers: what their documentation says, held against what they give.

Softmax over the logits, the K largest, renormalised or not; the weights' layout, the activation and its numbers are
found by value as for any other layer. What the installed runtime is known to get wrong is refused by name.

T tokens, K experts per token, E experts, D model width, F expert width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moec.frontends.onnx.banks import Found
from moec.frontends.onnx.constants import Constants
from moec.frontends.onnx.layer import Layer, Left, Router, Run, element
from moec.frontends.onnx.prove import fits, tensor
from moec.frontends.onnx.solve import Recorded, in_words, lift, loose, solve

DOMAIN = "com.microsoft"
MATRICES, BIASES = {"MoE": (2, 4, 6), "QMoE": (2, 5, 8)}, {"MoE": (3, 5, 7), "QMoE": (4, 7, 10)}
SCALES, ZERO_POINTS = (3, 6, 9), (11, 12, 13)
# QMoE may round its rows to 8 bits.
ROUNDED = 2e-2


@dataclass(frozen=True)
class MoeNode:
    """One node with its attributes by name."""

    node: Any
    reason: str = ""

    @property
    def name(self) -> str:
        return str(self.node.name or self.node.outputs[0].name)

    @property
    def values(self) -> tuple[Any, Any, Any]:
        """x, logits and y."""
        return self.node.inputs[0], self.node.inputs[1], self.node.outputs[0]

    def number(self, name: str, default: float) -> float:
        attribute = self.node.attributes.get(name)
        return default if attribute is None else float(attribute.value)

    def operand(self, place: int) -> Any:
        return self.node.inputs[place] if place < len(self.node.inputs) else None

    @property
    def router(self) -> Router:
        return Router(int(self.number("k", 1)), bool(self.number("normalize_routing_weights", 0)))


def moe_nodes(nodes: Iterable[Any]) -> list[MoeNode]:
    return [MoeNode(node) for node in nodes if node.domain == DOMAIN and node.op_type in MATRICES]


def prove_node(one: MoeNode, read: Constants, runs: Sequence[Run]) -> Layer | Left:
    """The layer that a node is, proved by value, or why it stays."""
    why = _refused(one, read)
    if why:
        return Left(one.name, why)
    found = _found(one, read)
    recorded = [_recorded(one, run) for run in runs]
    solution = solve(recorded[0], found)
    if solution is None or not all(fits(solution, each) for each in recorded[1:]):
        return Left(one.name, _known_bad(one) or "the runtime gives something else than its documentation says")
    x, logits, y = one.values
    dtypes = element(runs[0], x), element(runs[0], logits)
    region, weights = lift(f"experts.{one.name}", solution, one.router.k, *dtypes)
    kept = ""
    if one.node.op_type == "QMoE":
        kept = 'its weights are quantized as they are; quantize="int8" writes them anew, with a scale for each output'
    evidence = (
        f"a {one.node.op_type} of {len(solution.body.w_in)} experts, {one.router.k} of them for each token",
        in_words(solution.activation),
        f"proved by value on {len(runs)} runs",
    )
    return Layer(
        name=one.name,
        region=region,
        weights=weights,
        x=x,
        y=y,
        routing=logits,
        form="logits",
        router=one.router,
        evidence=evidence,
        doubt="" if one.router.normalize else _known_bad(one),
        kept=kept,
        bar=recorded[0].bar if kept else 0.0,
    )


def _refused(one: MoeNode, read: Constants) -> str:
    operands = [one.operand(place) for place in MATRICES[one.node.op_type][:2]]
    if not all(value is not None and read.holds(value) for value in operands):
        return "its weights are not in the file"
    if one.number("use_sparse_mixer", 0):
        return "it asks for use_sparse_mixer, which ONNX Runtime ignores on the CPU (B3), so nothing can be checked"
    quant_type = one.node.attributes.get("quant_type")
    if quant_type is not None and quant_type.as_string() != "int":
        return f"its weights are {quant_type.as_string()}, which ONNX Runtime does not compute on the CPU"
    if one.operand(14) is not None:
        return "it has router weights beside its logits"
    return ""


def _known_bad(one: MoeNode) -> str:
    """The defect that explains another result."""
    if one.router.normalize:
        return ""
    if one.node.op_type == "MoE":
        return "ONNX Runtime gives zeros with normalize_routing_weights=0 (B1), so nothing can be checked against it"
    return (
        "ONNX Runtime renormalises in spite of normalize_routing_weights=0 (B2), so nothing can be checked against it"
    )


def _found(one: MoeNode, read: Constants) -> Found:
    """Its weights, and the numbers in its attributes."""
    kind = one.node.op_type
    matrices = tuple(_matrices(one, read)) if kind == "QMoE" else tuple(_held(one, read, MATRICES["MoE"]))
    biases = tuple(bank for bank in _held(one, read, BIASES[kind]) if bool(bank.any()))
    limit = one.number("swiglu_limit", math.inf)
    numbers = [one.number("activation_alpha", 1.0), one.number("activation_beta", 0.0)]
    return Found(matrices, biases, tuple(numbers), (limit,) if math.isfinite(limit) else ())


def _held(one: MoeNode, read: Constants, places: Sequence[int]) -> Iterator[torch.Tensor]:
    for place in places:
        value = one.operand(place)
        if value is not None:
            yield read.tensor(value)


def _matrices(one: MoeNode, read: Constants) -> Iterator[torch.Tensor]:
    """QMoE's weights as what they mean: (q - zero point) * scale, [E, N, C]."""
    bits = int(one.number("expert_weight_bits", 4))
    for place, scale_at, zero_at in zip(MATRICES["QMoE"], SCALES, ZERO_POINTS, strict=True):
        packed, scale, zero = (one.operand(at) for at in (place, scale_at, zero_at))
        if packed is not None and scale is not None:
            points = None if zero is None else unpacked(read.tensor(zero), bits)
            yield dequantized(unpacked(read.tensor(packed), bits), read.tensor(scale).float(), points, bits)


def unpacked(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8[..., C * bits / 8] -> [..., C], the lowest bits first."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    found: torch.Tensor = ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)
    return found


def dequantized(q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int) -> torch.Tensor:
    """q[E, N, C], scale[E, N] or [E, N, B], zero like scale -> f32[E, N, C]."""
    blocks = scale.unsqueeze(-1) if scale.dim() == 2 else scale
    size = -(-q.shape[-1] // blocks.shape[-1])
    wide: torch.Tensor = blocks.repeat_interleave(size, -1)[..., : q.shape[-1]]
    if zero is None:
        return (q.float() - (1 << bits - 1)) * wide
    points = zero.reshape(*zero.shape[:2], -1)[..., : blocks.shape[-1]].float()
    return (q.float() - points.repeat_interleave(size, -1)[..., : q.shape[-1]]) * wide


def _recorded(one: MoeNode, run: Run) -> Recorded:
    """Its values in one run, and what its documentation makes of the logits."""
    x, logits, y = one.values
    scores = tensor(run[logits.name]).float()
    scores = scores.reshape(-1, scores.shape[-1])
    chosen, weights = routed(scores, one.router)
    rows = {name: tensor(run[name]).reshape(len(scores), -1).float() for name in (x.name, y.name)}
    bar = max(loose(run[value.name] for value in (x, y)), ROUNDED if one.node.op_type == "QMoE" else 0.0)
    return Recorded(
        chosen, {x.name: rows[x.name]}, {logits.name: weights}, {y.name: rows[y.name]}, {logits.name: "logits"}, bar
    )


def routed(logits: torch.Tensor, router: Router) -> tuple[torch.Tensor, torch.Tensor]:
    """logits[T, E] -> experts[T, K] and weights[T, K]."""
    if router.normalize:
        best, chosen = logits.topk(router.k, -1)
        return chosen, best.softmax(-1)
    weights, chosen = logits.softmax(-1).topk(router.k, -1)
    return chosen, weights
