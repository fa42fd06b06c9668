"""The original part of a graph alone, in ONNX Runtime, against the region that it was lifted to.

T tokens, K experts per token, E experts, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from moec.backendbase import load_backend
from moec.backends.onnx.runtime import session
from moec.exporter.check import LOW_BARS, Check
from moec.exporter.probes import region_probes
from moec.frontends.onnx.graphs import with_inner
from moec.frontends.onnx.layer import Layer, Run
from moec.frontends.onnx.moe_ops import routed

# Clamps hide at unit scale.
SCALES = (1.0, 0.05, 60.0)
BAR = 1e-5
# Where the original gathers the weights of each slot, this is how much it may gather at once, in bytes.
MOST_GATHERED = 1 << 28
Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Part:
    """The nodes between what a layer reads and what it gives, to run; and what they read of the file's own inputs."""

    runtime: Any
    cut: tuple[Any, ...]
    """Values that are handed in: x, and what tells the experts."""
    like: Run
    """Arrays of one run of the file, for their shapes and types."""
    more: tuple[str, ...]
    tokens: int
    """Of that run."""

    @property
    def fixed(self) -> bool:
        """Whether it runs on as many tokens as that run had alone: the file says so, or it reads more of that run."""
        return bool(self.more) or any(_states_all(value.shape) for value in self.cut)

    def fits(self, tokens: int) -> bool:
        """Whether the part can run on this many tokens."""
        return tokens == self.tokens or not self.fixed

    def __call__(self, tensors: Tensors) -> list[torch.Tensor]:
        return [torch.from_numpy(np.ascontiguousarray(one)) for one in self.runtime.run(None, self.feed(tensors))]

    def given(self, layer: Layer, inputs: Tensors) -> Tensors:
        """Tensors in the order of the cut, of x, experts[T, K] and weights[T, K], of x and scores[T, E], or of x."""
        if layer.form != "slots":
            return inputs[: len(self.cut)]
        several = [column.contiguous() for column in inputs[1].split(1, 1)] if len(layer.ids) > 1 else [inputs[1]]
        return [inputs[0], *several, *([] if layer.routing is None else [inputs[2]])]

    def feed(self, tensors: Tensors) -> dict[str, Any]:
        """What to hand to ONNX Runtime, in the types and with the dimensions that the file has."""
        feed = {name: self.like[name] for name in self.more}
        for value, given in zip(self.cut, tensors, strict=True):
            like = self.like[value.name]
            # Other numbers of tokens are sequences of one.
            others = (len(given), *[1] * (like.ndim - 2), *given.shape[1:][-1:])[: like.ndim]
            shape = like.shape if given.numel() == like.size else others
            feed[value.name] = given.numpy().reshape(shape).astype(like.dtype)
        return feed


def _states_all(shape: Any) -> bool:
    return shape is not None and all(isinstance(size, int) for size in shape)


def confirm(model: Any, layer: Layer, run: Run) -> Check:
    """Routings and scales that the file itself would not meet; `run` has the recorded values of one run of it."""
    check = Check(bar=max(BAR, layer.bar, LOW_BARS.get(layer.region.inputs[0].type.dtype, 0.0)), loose=10.0)
    told = [*layer.ids, layer.routing] if layer.form in ("gates", "places") else []
    try:
        part = part_of(model, layer, run, told)
    except Exception as error:  # onnx-ir raises what it likes for a part that is not one
        check.why = f"its part of the graph cannot be cut out: {str(error).splitlines()[0][:160]}"
        return check
    judge = load_backend("reference").build(layer.region, layer.weights, {})
    for label, inputs in _probes(layer, part):
        if part.fits(len(inputs[0])) and not check.why:
            _compare(check, label, layer, part, judge, inputs)
    return check


def part_of(
    model: Any, layer: Layer, run: Run, told: Sequence[Any] = (), runs_fast: Mapping[str, Any] | None = None
) -> Part:
    """A model of what lies between what a layer reads and what it gives; `told` are values to give besides,
    `runs_fast` options of its session.

    Raises what onnx-ir raises where nothing does.
    """
    cuts = {"dense": (layer.x,), "slots": (layer.x, *layer.ids, layer.routing), "logits": (layer.x, layer.routing)}
    cut = tuple(value for value in cuts.get(layer.form, (layer.x, layer.scores)) if value is not None)
    outputs = [layer.y, *told]
    for value in cut:
        if value.type is None:  # it is computed by an op that ONNX does not know
            value.type = ir.TensorType(ir.DataType.from_numpy(run[value.name].dtype))
            value.shape = ir.Shape([None] * run[value.name].ndim)
    reads = _reads(model, cut, outputs)
    graph = ir.convenience.extract(
        model.graph, inputs=[v.name for v in [*cut, *reads]], outputs=list(dict.fromkeys(v.name for v in outputs))
    )
    graph.opset_imports.update(model.opset_imports)
    tokens = run[layer.x.name].size // layer.width
    part = ir.Model(graph, ir_version=model.ir_version)
    return Part(
        session(part, **(runs_fast or {})),
        cut,
        run,
        tuple(value.name for value in reads),
        tokens,
    )


def _reads(model: Any, cut: tuple[Any, ...], outputs: list[Any]) -> list[Any]:
    """Inputs of the file that the outputs depend on otherwise than through the cut."""
    inputs, found = set(model.graph.inputs), dict[Any, None]()
    seen, todo = set(cut), list(outputs)
    while todo:
        value = todo.pop()
        if value in seen or value is None:
            continue
        seen.add(value)
        if value in inputs:
            found[value] = None
        elif value.producer() is not None:
            todo += [read for node in with_inner([value.producer()]) for read in node.inputs]
    return list(found)


def _probes(layer: Layer, part: Part) -> Iterator[tuple[str, Tensors]]:
    """What to hand to the part: x, and for a mixture its experts and weights, or the scores they are chosen by."""
    if layer.form in ("gates", "places", "logits"):
        yield from _scored(layer, part)
        return
    most = _most_tokens(layer)
    for label, found in region_probes(layer.region):
        if "no token" in label or (len(found[0]) > most and not part.fixed):
            continue
        inputs = [_resized(tensor, part.tokens) for tensor in found] if part.fixed else found
        same = label.startswith(("all on", "equal")) and len(inputs) == 3
        yield label, [inputs[0], _distinct(inputs[1], layer.experts).int(), inputs[2]] if same else inputs
    tokens = part.tokens if part.fixed else min(part.tokens, most)
    rounds = -(-layer.experts // tokens) if layer.form == "slots" else 1
    for scale in SCALES:
        for turn in range(rounds):
            yield f"scale {scale:g}", _in_turns(layer, tokens, turn, scale)


def _resized(tensor: torch.Tensor, tokens: int) -> torch.Tensor:
    """Its rows over and over, as many as there are tokens."""
    return tensor[torch.arange(tokens) % len(tensor)]


def _most_tokens(layer: Layer) -> int:
    weights = sum(bank[0].numel() for bank in layer.weights.banks.values()) * 4
    return max(2, MOST_GATHERED // max(1, weights * layer.k))


def _scored(layer: Layer, part: Part) -> Iterator[tuple[str, Tensors]]:
    """x[T, D] and scores[T, E], which serve as logits and as chances: many experts, one, ties, several scales."""
    generator = torch.Generator().manual_seed(0)
    most = _most_tokens(layer)
    counts = [part.tokens] if part.fixed else sorted({min(count, most) for count in (1, 2, 7, 33, 200)})
    for tokens in counts:
        for scale in SCALES:
            x = torch.randn(tokens, layer.width, generator=generator) * scale
            scores = torch.randn(tokens, layer.experts, generator=generator).mul(2).softmax(-1)
            yield f"{tokens} tokens, scale {scale:g}", [x, scores]
        x = torch.randn(tokens, layer.width, generator=generator)
        for expert in range(0, layer.experts, max(1, layer.experts // 4)):
            scores = torch.rand(tokens, layer.experts, generator=generator)
            scores[:, expert] += layer.experts
            yield f"{tokens} tokens, most on expert {expert}", [x, scores / scores.sum(-1, keepdim=True)]
        if layer.form != "logits":  # which of two equal experts an op takes is its own affair
            yield f"{tokens} equal tokens", [x[:1].expand_as(x), torch.full((tokens, layer.experts), 1 / layer.experts)]


def _in_turns(layer: Layer, tokens: int, turn: int, scale: float) -> Tensors:
    """Random inputs of the region with this many tokens, which go through all experts in turns."""
    generator = torch.Generator().manual_seed(turn)
    x = torch.randn(tokens, layer.width, generator=generator) * scale
    if layer.form == "dense":
        return [x]
    first = torch.arange(tokens) + turn * tokens
    ids = (first.unsqueeze(1) + torch.arange(layer.k)) % layer.experts
    return [x, ids.int(), torch.rand(tokens, layer.k, generator=generator)]


def _distinct(ids: torch.Tensor, experts: int) -> torch.Tensor:
    """A router never chooses an expert twice, and the graph may rest on that."""
    return (ids[:, :1] + torch.arange(ids.shape[1])) % experts


def _compare(check: Check, label: str, layer: Layer, part: Part, judge: Any, inputs: Tensors) -> None:
    try:
        found = part(part.given(layer, inputs))
    except Exception as error:  # ONNX Runtime's errors have no common class
        check.why = check.why or f"{label}: {str(error).splitlines()[0][:160]}"
        return
    (theirs,) = judge(*_asked(layer, inputs, found))
    check.labels.append(label)
    check.add(label, found[0].reshape(theirs.shape).to(theirs.dtype), theirs)


def _asked(layer: Layer, inputs: Tensors, found: list[torch.Tensor]) -> Tensors:
    """What the region is to compute: x, experts[T, K] and weights[T, K], in its types."""
    types = [DTYPES[value.type.dtype] for value in layer.region.inputs]
    x = inputs[0].to(types[0])
    if layer.form == "dense":
        return [x]
    if layer.form == "slots":
        weights = inputs[2] if layer.routing is not None else torch.ones_like(inputs[2])
        return [x, inputs[1].int(), weights.to(types[2])]
    if layer.form == "logits":
        assert layer.router is not None
        chosen, told = routed(inputs[1].float(), layer.router)
        return [x, chosen.int(), told.to(types[2])]
    tokens = len(inputs[0])
    ids = torch.cat([one.reshape(tokens, -1) for one in found[1:-1]], 1).long()
    gates = found[-1] if layer.form == "gates" else found[-1].sum(-1)
    return [x, ids.int(), gates.reshape(tokens, -1).gather(1, ids).to(types[2])]


DTYPES: Mapping[str, torch.dtype] = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i32": torch.int32,
}
