"""What ONNX Runtime's CUDA provider makes of its own MoE ops, run on a GPU against layers whose results are known.

T tokens, E experts, K experts per token, D model width, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import erf
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import torch

from moec.backends.onnx.defects import Finding
from moec.backends.onnx.providers import CPU, CUDA
from moec.backends.onnx.stacks import pack, scales

Array = Any
Act = Callable[[Array], Array]
T, E, K, D, F = 9, 4, 2, 256, 256
# Products of 16-bit numbers, and logits of weights in 16 bits.
CLOSE = {"fp32": 5e-3, "fp16": 1e-2, "bf16": 4e-2}
TYPES: dict[str, tuple[Any, Any]] = {
    "fp32": (ir.DataType.FLOAT, np.float32),
    "fp16": (ir.DataType.FLOAT16, np.float16),
    "bf16": (ir.DataType.BFLOAT16, ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class Gated:
    """A gated layer: act(x gate') * (x up') through down, for weights[T, E] of any router."""

    x: Array
    logits: Array
    gate: Array
    up: Array
    down: Array

    @classmethod
    def make(cls) -> Gated:
        random = np.random.default_rng(0)
        shapes = ((T, D), (T, E), (E, F, D), (E, F, D), (E, D, F))
        x, logits, gate, up, down = (random.standard_normal(shape).astype(np.float32) for shape in shapes)
        return cls(x, 2 * logits, gate / 16, up / 16, down / 16)

    def result(self, weights: Array, act: Act, *, shift: float = 0, limit: float = np.inf) -> Array:
        """[T, D] by float64."""
        x, gate, up, down = (one.astype(np.float64) for one in (self.x, self.gate, self.up, self.down))
        g = np.minimum(np.einsum("td,efd->tef", x, gate), limit)
        u = np.clip(np.einsum("td,efd->tef", x, up), -limit, limit)
        return np.einsum("te,tef,edf->td", weights, act(g) * (u + shift), down)

    def weights(self, *, normalized: bool = True) -> Array:
        """Softmax of the logits for the K largest of each token, over those or over all."""
        p = np.exp(self.logits - self.logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        kept = np.where(p >= np.sort(p, 1)[:, -K][:, None], p, 0)
        return kept / kept.sum(1, keepdims=True) if normalized else kept

    @property
    def interleaved(self) -> Array:
        return np.stack([self.gate, self.up], 2).reshape(E, 2 * F, D)


def silu(x: Array, alpha: float = 1.0) -> Array:
    return x / (1 + np.exp(-alpha * x))


def gelu(x: Array) -> Array:
    return x / 2 * (1 + np.vectorize(erf)(x / 2**0.5))


def run_on_cuda(
    op: str,
    layer: Gated,
    tensors: Mapping[str, Array],
    inputs: tuple[str, ...],
    dtype: str,
    *,
    providers: Sequence[Any] = ((CUDA, {"use_tf32": "0"}),),
    **attributes: Any,
) -> Array:
    """The op between casts from and to fp32, on the CUDA provider alone: it fails where the op has no kernel."""
    kind, numpy_type = TYPES[dtype]
    values = {}
    for name, array in tensors.items():
        held = array if array.dtype == np.uint8 else array.astype(numpy_type)
        values[name] = ir.Value(name=name, const_value=ir.Tensor(held, name=name))
    x, logits = (
        ir.Value(name=name, shape=ir.Shape(["T", size]), type=ir.TensorType(ir.DataType.FLOAT))
        for name, size in (("x", D), ("logits", E))
    )
    before = [ir.node("Cast", [one], {"to": int(kind)}) for one in (x, logits)]
    more = [values[name] if name else None for name in inputs]
    middle = ir.node(
        op, [*(one.outputs[0] for one in before), *more], {"k": K, "normalize_routing_weights": 1, **attributes},
        domain="com.microsoft", version=1,
    )  # fmt: skip
    after = ir.node("Cast", [middle.outputs[0]], {"to": int(ir.DataType.FLOAT)})
    y = after.outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape(["T", D]), ir.TensorType(ir.DataType.FLOAT)
    opsets = {"": 18, "com.microsoft": 1}
    nodes = [*before, middle, after]
    graph = ir.Graph(
        [x, logits], [y], nodes=nodes, initializers=list(values.values()), opset_imports=opsets, name="case"
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if CPU not in providers:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    serialized = ir.to_proto(ir.Model(graph, ir_version=9)).SerializeToString()
    session = onnxruntime.InferenceSession(serialized, options, providers=list(providers))
    return session.run(None, {"x": layer.x, "logits": layer.logits})[0]


@dataclass(frozen=True)
class Case:
    """How a case is run on the CUDA provider and what it should give."""

    name: str
    op: str
    asks: str
    dtype: str
    run: Callable[[Gated], Array]
    right: Callable[[Gated], Array]
    advice: str = "use the portable form"


def _moe(dtype: str, **attributes: Any) -> Callable[[Gated], Array]:
    """swiglu_fusion=1: gate and up by turns in one matrix."""
    attributes = {"activation_type": "swiglu", "swiglu_fusion": 1, **attributes}
    return lambda layer: run_on_cuda(
        "MoE", layer, {"w1": layer.interleaved, "w2": layer.down}, ("w1", "", "w2"), dtype, **attributes
    )


def _fc3(activation: str) -> Callable[[Gated], Array]:
    """Gate and up in matrices of their own."""
    return lambda layer: run_on_cuda(
        "MoE", layer, {"w1": layer.gate, "w2": layer.down, "w3": layer.up}, ("w1", "", "w2", "", "w3"), "fp16",
        activation_type=activation,
    )  # fmt: skip


def rounded(layer: Gated, bits: int, block: int) -> tuple[Gated, dict[str, Array]]:
    """QMoE's tensors, and the layer that they mean."""
    found, meant = {}, []
    for name, w in (("1", layer.interleaved), ("2", layer.down)):
        factors = [scales(torch.from_numpy(one), bits, block).half() for one in w]
        found["s" + name] = torch.stack(factors).numpy()
        found["q" + name] = np.stack([pack(torch.from_numpy(one), f, bits) for one, f in zip(w, factors, strict=True)])
        wide = np.repeat(found["s" + name].astype(np.float32), block, -1)
        most = 2 ** (bits - 1) - 1
        meant.append(np.clip(np.round(w / wide), -most, most) * wide)
    both = meant[0].reshape(E, F, 2, D)
    return replace(layer, gate=both[:, :, 0], up=both[:, :, 1], down=meant[1]), found


def _qmoe(bits: int, block: int, **attributes: Any) -> Callable[[Gated], Array]:
    attributes = {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0, **attributes}
    attributes |= {"activation_beta": 0.0, "expert_weight_bits": bits, "block_size": block}
    names = ("q1", "s1", "", "q2", "s2")
    return lambda layer: run_on_cuda("QMoE", layer, rounded(layer, bits, block)[1], names, "fp16", **attributes)


def _unlike_softmax(layer: Gated) -> Array:
    """Weights of a sigmoid router, not normalised; the last token has none."""
    weights = np.where(layer.weights() > 0, 1 / (1 + np.exp(-layer.logits)), 0)
    weights[-1] = 0
    return weights


def _by_logarithms(run: Callable[[Gated], Array]) -> Callable[[Gated], Array]:
    def call(layer: Gated) -> Array:
        weights = _unlike_softmax(layer)
        floored = np.maximum(weights, np.where(layer.weights() > 0, 1e-30, 1e-37))
        return run(replace(layer, logits=np.log(floored).astype(np.float32))) * weights.sum(1, keepdims=True)

    return call


def _right(act: Callable[[Array], Array] = silu, bits: int = 0, block: int = 0, **how: Any) -> Callable[[Gated], Array]:
    normalized = how.pop("normalized", True)
    any_router = how.pop("any_router", False)

    def call(layer: Gated) -> Array:
        weights = _unlike_softmax(layer) if any_router else layer.weights(normalized=normalized)
        meant = rounded(layer, bits, block)[0] if bits else layer
        return meant.result(weights, act, **how)

    return call


def _gpt_oss(x: Array) -> Array:
    return silu(x, 1.702)


_PLAIN = {"activation_alpha": 1.0, "activation_beta": 0.0}
_RAW = {"weights_prepacked": 0}
_GPT_OSS = {"activation_alpha": 1.702, "activation_beta": 1.0, "swiglu_limit": 7.0}
_ALL = "renormalise, and feed logarithms of the weights"
_PREPACKED = "set weights_prepacked=0"
CASES = (
    Case("cuda-swiglu-fp32", "MoE", "silu times up, interleaved", "fp32", _moe("fp32", **_PLAIN), _right()),
    Case("cuda-swiglu", "MoE", "silu times up, interleaved", "fp16", _moe("fp16", **_PLAIN), _right()),
    Case("cuda-swiglu-bf16", "MoE", "silu times up, interleaved", "bf16", _moe("bf16", **_PLAIN), _right()),
    Case("cuda-swiglu-gpt-oss", "MoE", "slope 1.702, up + 1, clamp 7", "fp16", _moe("fp16", **_GPT_OSS),
         _right(_gpt_oss, shift=1, limit=7)),
    Case("cuda-log-weights", "MoE", "any router by log-weights", "fp16", _by_logarithms(_moe("fp16", **_PLAIN)),
         _right(any_router=True)),
    Case("cuda-all-experts", "MoE", "weights over all experts", "fp16",
         _moe("fp16", **_PLAIN, normalize_routing_weights=0), _right(normalized=False), _ALL),
    Case("cuda-gated-silu", "MoE", "silu times a third matrix", "fp16", _fc3("silu"), _right(), "use swiglu_fusion=1"),
    Case("cuda-gated-gelu", "MoE", "gelu times a third matrix", "fp16", _fc3("gelu"), _right(gelu)),
    Case("cuda-qmoe-raw", "QMoE", "int8 weights as they lie, not told so", "fp16", _qmoe(8, 128),
         _right(bits=8, block=128), _PREPACKED),
    Case("cuda-qmoe-int8-128", "QMoE", "int8, blocks of 128, told so", "fp16", _qmoe(8, 128, **_RAW),
         _right(bits=8, block=128)),
    Case("cuda-qmoe-int8-64", "QMoE", "int8, blocks of 64, told so", "fp16", _qmoe(8, 64, **_RAW),
         _right(bits=8, block=64)),
    Case("cuda-qmoe-int4-64", "QMoE", "int4, blocks of 64, told so", "fp16", _qmoe(4, 64, **_RAW),
         _right(bits=4, block=64)),
    Case("cuda-qmoe-int4-32", "QMoE", "int4, blocks of 32, told so", "fp16", _qmoe(4, 32, **_RAW),
         _right(bits=4, block=32)),
    Case("cuda-qmoe-log-weights", "QMoE", "any router by log-weights", "fp16", _by_logarithms(_qmoe(8, 128, **_RAW)),
         _right(bits=8, block=128, any_router=True)),
)  # fmt: skip
# What a target's form rests on.
RESTS_ON = {
    "--target cuda": ("cuda-swiglu-fp32", "cuda-swiglu", "cuda-swiglu-gpt-oss", "cuda-log-weights"),
    "--target cuda --quantize int8": ("cuda-qmoe-int8-128", "cuda-qmoe-int8-64", "cuda-qmoe-log-weights"),
    "--target cuda --quantize int4": ("cuda-qmoe-int4-64", "cuda-qmoe-int4-32", "cuda-qmoe-log-weights"),
}


def examine_cuda() -> list[Finding]:
    """Every case on the CUDA provider, which must load."""
    layer = Gated.make()
    return [_finding(case, layer) for case in CASES]


def _finding(case: Case, layer: Gated) -> Finding:
    try:
        mine = case.run(layer)
    except Exception as error:  # ONNX Runtime's errors have no common class
        reason = str(error).strip().splitlines()[0][:160]
        return Finding(case.name, case.op, case.asks, "refused", reason, case.advice)
    theirs = case.right(layer)
    apart = float(np.linalg.norm(mine - theirs) / np.linalg.norm(theirs))
    asks = f"{case.asks}, {case.dtype}"
    if apart <= CLOSE[case.dtype]:
        return Finding(case.name, case.op, asks, "right", f"error {apart:.1e}", "")
    found = "all zeros" if not mine.any() else f"error {apart:.2g}"
    return Finding(case.name, case.op, asks, "wrong", found, case.advice)
