"""Known defects of ONNX Runtime's own MoE ops, run against the version that is installed.

T tokens, E experts, K experts per token, D model width, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import onnxruntime

Array = Any
T, E, K, D, F = 6, 4, 2, 32, 32
CLOSE = 1e-4


@dataclass(frozen=True)
class Finding:
    """One case: what the op should do, and what it does here."""

    name: str
    op: str
    asks: str
    status: Literal["right", "wrong", "refused"]
    found: str
    advice: str
    """What to do where it is wrong."""


@dataclass(frozen=True)
class Layer:
    """A small layer whose result is known: relu between two matrices, logits outside."""

    x: Array
    logits: Array
    w1: Array
    w2: Array

    @classmethod
    def make(cls) -> Layer:
        random = np.random.default_rng(0)
        shapes = ((T, D), (T, E), (E, F, D), (E, D, F))
        x, logits, w1, w2 = (random.standard_normal(shape).astype(np.float32) for shape in shapes)
        return cls(x, 2 * logits, w1 / 6, w2 / 6)

    def result(self, weights: Array) -> Array:
        """The weighted sum over all experts for weights[T, E]."""
        h = np.maximum(np.einsum("td,efd->tef", self.x, self.w1), 0)
        return np.einsum("te,tef,edf->td", weights, h, self.w2)

    def weights(self, *, normalized: bool) -> Array:
        """Softmax of the logits for the K largest of each token, [T, E], over all or over those."""
        p = np.exp(self.logits - self.logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        kept = np.where(p >= np.sort(p, 1)[:, -K][:, None], p, 0)
        return kept / kept.sum(1, keepdims=True) if normalized else kept


def quantized(layer: Layer) -> tuple[Layer, dict[str, Array]]:
    """QMoE's uint8 weights around 128 with a scale for each output, and the layer that they mean."""
    found, meant = {}, []
    for name, w in (("1", layer.w1), ("2", layer.w2)):
        scale = (np.abs(w).max(-1) / 127).astype(np.float32)
        found["q" + name] = (np.round(w / scale[..., None]) + 128).astype(np.uint8)
        found["s" + name] = scale
        meant.append((found["q" + name].astype(np.float32) - 128) * scale[..., None])
    return Layer(layer.x, layer.logits, *meant), found


def run_op(op: str, layer: Layer, tensors: Mapping[str, Array], inputs: tuple[str, ...], **attributes: Any) -> Array:
    """The op between two other nodes, so that it may run in place, as in a real model; on the CPU."""
    values = {name: ir.Value(name=name, const_value=ir.Tensor(array, name=name)) for name, array in tensors.items()}
    zero = ir.Value(name="zero", const_value=ir.Tensor(np.zeros(1, np.float32), name="zero"))
    x, logits = (
        ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        for name, shape in (("x", ["T", D]), ("logits", ["T", E]))
    )
    before = ir.node("Add", [x, zero])
    more = [values[name] if name else None for name in inputs]
    attributes = {"k": K, "activation_type": "relu", **attributes}
    middle = ir.node(op, [before.outputs[0], logits, *more], attributes, domain="com.microsoft", version=1)
    after = ir.node("Add", [middle.outputs[0], zero])
    y = after.outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape(["T", D]), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [x, logits],
        [y],
        nodes=[before, middle, after],
        initializers=[*values.values(), zero],
        opset_imports={"": 18, "com.microsoft": 1},
        name="case",
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    serialized = ir.to_proto(ir.Model(graph, ir_version=9)).SerializeToString()
    session = onnxruntime.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": layer.x, "logits": layer.logits})[0]


MOE = ("w1", "", "w2")
QMOE = ("q1", "s1", "", "q2", "s2")


def _moe(**attributes: Any) -> Callable[[Layer], Array]:
    return lambda layer: run_op("MoE", layer, {"w1": layer.w1, "w2": layer.w2}, MOE, **attributes)


def _qmoe(**attributes: Any) -> Callable[[Layer], Array]:
    return lambda layer: run_op("QMoE", layer, quantized(layer)[1], QMOE, expert_weight_bits=8, **attributes)


def _log_weights(run: Callable[[Layer], Array]) -> Callable[[Layer], Array]:
    """Any weights by logits that are their logarithms, renormalised by the op, and the sum put back behind it."""

    def call(layer: Layer) -> Array:
        weights = _unlike_softmax(layer)
        logits = np.log(np.maximum(weights, 1e-38)).astype(np.float32)
        return run(Layer(layer.x, logits, layer.w1, layer.w2)) * weights.sum(1, keepdims=True)

    return call


def _unlike_softmax(layer: Layer) -> Array:
    """Weights of a sigmoid router, not normalised; the last token has none."""
    weights = np.where(layer.weights(normalized=False) > 0, 1 / (1 + np.exp(-layer.logits)), 0)
    weights[-1] = 0
    return np.where(weights > 0, weights, 1e-30) * (weights.sum(1, keepdims=True) > 0)


@dataclass(frozen=True)
class Case:
    """How a case is run and what it should give."""

    name: str
    op: str
    asks: str
    run: Callable[[Layer], Array]
    right: Callable[[Layer], Array]
    advice: str


def _plain(normalized: bool) -> Callable[[Layer], Array]:
    return lambda layer: layer.result(layer.weights(normalized=normalized))


def _chosen(layer: Layer) -> Array:
    return layer.result(_unlike_softmax(layer))


def _of_quantized(right: Callable[[Layer], Array]) -> Callable[[Layer], Array]:
    return lambda layer: right(quantized(layer)[0])


_USE = "renormalise, and feed logarithms of the weights (see log-weights)"
CASES = (
    Case("moe-normalized", "MoE", "weights of the chosen experts", _moe(normalize_routing_weights=1), _plain(True), ""),
    Case("B1", "MoE", "weights over all experts, in place", _moe(normalize_routing_weights=0), _plain(False), _USE),
    Case(
        "qmoe-normalized", "QMoE", "weights of the chosen experts",
        _qmoe(normalize_routing_weights=1), _of_quantized(_plain(True)), "",
    ),
    Case(
        "B2", "QMoE", "weights over all experts",
        _qmoe(normalize_routing_weights=0), _of_quantized(_plain(False)), _USE,
    ),
    Case(
        "moe-log-weights", "MoE", "any router by log-weights",
        _log_weights(_moe(normalize_routing_weights=1)), _chosen, "use the portable form",
    ),
    Case(
        "qmoe-log-weights", "QMoE", "any router by log-weights",
        _log_weights(_qmoe(normalize_routing_weights=1)), _of_quantized(_chosen), "use the portable form",
    ),
)  # fmt: skip
# What a target's form rests on.
RESTS_ON = {"--target cpu": ("moe-log-weights", "qmoe-log-weights")}


def examine() -> list[Finding]:
    """Every case on the installed ONNX Runtime's CPU provider."""
    layer = Layer.make()
    return [*(_finding(case, layer) for case in CASES), *_ignored(layer), _empty_reduction()]


def _finding(case: Case, layer: Layer) -> Finding:
    try:
        mine = case.run(layer)
    except Exception as error:  # ONNX Runtime's errors have no common class
        return Finding(case.name, case.op, case.asks, "refused", str(error).splitlines()[0][:160], case.advice)
    theirs = case.right(layer)
    apart = float(np.linalg.norm(mine - theirs) / np.linalg.norm(theirs))
    if apart <= CLOSE:
        return Finding(case.name, case.op, case.asks, "right", f"error {apart:.1e}", "")
    found = "all zeros" if not mine.any() else f"error {apart:.2g}"
    return Finding(case.name, case.op, case.asks, "wrong", found, case.advice)


def _empty_reduction() -> Finding:
    """B4: the largest of each of no rows, [0, C] -> [0, 1], which experts without rows meet, over axis -1."""
    x = ir.Value(name="x", shape=ir.Shape(["R", D]), type=ir.TensorType(ir.DataType.FLOAT))
    last = ir.Value(name="last", const_value=ir.Tensor(np.array([-1]), name="last"))
    node = ir.node("ReduceMax", [x, last], {"keepdims": 1})
    y = node.outputs[0]
    y.name, y.type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], [y], nodes=[node], initializers=[last], opset_imports={"": 18}, name="case")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    serialized = ir.to_proto(ir.Model(graph, ir_version=9)).SerializeToString()
    session = onnxruntime.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])
    shape = session.run(None, {"x": np.zeros((0, D), np.float32)})[0].shape
    right = shape == (0, 1)
    advice = "" if right else "name the axis by its number"
    found = f"{list(shape)} instead of [0, 1]" if not right else "[0, 1]"
    return Finding(
        "B4", "ReduceMax", "the largest of no rows over axis -1", "right" if right else "wrong", found, advice
    )


def _ignored(layer: Layer) -> list[Finding]:
    """B3: attributes that change what is asked for, and change nothing."""
    usual = _moe(normalize_routing_weights=1)(layer)
    cases = (
        ("B3", "MoE", "use_sparse_mixer=1", _moe(normalize_routing_weights=1, use_sparse_mixer=1), usual),
        (
            "B3", "QMoE", 'quant_type="fp8" on integer weights',
            _qmoe(normalize_routing_weights=1, quant_type="fp8"), _qmoe(normalize_routing_weights=1)(layer),
        ),
    )  # fmt: skip
    found = []
    for name, op, asks, run, without in cases:
        advice = "do not set it"
        try:
            same = np.array_equal(run(layer), without)
            text = "ignored: the result is the same without it" if same else "it changes the result"
            found.append(Finding(name, op, asks, "wrong" if same else "right", text, advice if same else ""))
        except Exception as error:  # a refusal is the right answer
            found.append(Finding(name, op, asks, "refused", str(error).splitlines()[0][:160], ""))
    return found
