"""A decoder as onnxruntime-genai builds it: caches as inputs, MoE nodes between ONNX Runtime's own ops.

B sequences, S tokens each, T = B * S, P tokens before them, D model width, E experts, F expert width, V words.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

D, E, F, V, HEADS, PAIRS = 32, 4, 24, 50, 4, 2
HEAD = D // HEADS


def decoder(path: Path) -> Path:
    """ids[B, S] -> logits[B, S, V]; experts as gpt-oss has them, so small that none of their values meets its limit."""
    random = np.random.default_rng(0)
    shapes = {
        "words": (V, D),
        "qkv": (D, (HEADS + 2 * PAIRS) * HEAD),
        "out": (D, D),
        "gate": (D, E),
        "w1": (E, 2 * F, D),
        "b1": (E, 2 * F),
        "w2": (E, D, F),
        "b2": (E, D),
        "head": (D, V),
    }
    tensors = {name: (random.standard_normal(shape) / 10).astype(np.float32) for name, shape in shapes.items()}
    tensors |= {"norm": np.ones(D, np.float32), "one": np.array(1), "last": np.array([1]), "flat": np.array([-1, E])}
    sizes: dict[str, list[Any]] = {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "past_sequence_length + sequence_length"],
        "past_key_values.0.key": ["batch_size", PAIRS, "past_sequence_length", "kv_cache_dim"],
        "past_key_values.0.value": ["batch_size", PAIRS, "past_sequence_length", "kv_cache_dim"],
    }
    given: dict[str, list[Any]] = {"logits": ["batch_size", "sequence_length", V]}
    given |= {f"present.0.{name}": ["batch_size", PAIRS, "total_sequence_length", HEAD] for name in ("key", "value")}
    graph = helper.make_graph(
        _nodes(),
        "decoder",
        [_value(name, shape) for name, shape in sizes.items()],
        [_value(name, shape) for name, shape in given.items()],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def _value(name: str, shape: list[Any]) -> Any:
    whole = name in ("input_ids", "attention_mask")
    return helper.make_tensor_value_info(name, TensorProto.INT64 if whole else TensorProto.FLOAT, shape)


def _nodes() -> list[Any]:
    def own(kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> Any:
        return helper.make_node(kind, inputs, outputs, domain="com.microsoft", name=f"/{kind}", **attributes)

    lengths = [
        helper.make_node("ReduceSum", ["attention_mask", "last"], ["counts"], keepdims=0),
        helper.make_node("Sub", ["counts", "one"], ["ends"]),
        helper.make_node("Cast", ["ends"], ["seqlens_k"], to=TensorProto.INT32),
        helper.make_node("Shape", ["attention_mask"], ["sizes"]),
        helper.make_node("Gather", ["sizes", "one"], ["total"]),
        helper.make_node("Cast", ["total"], ["total_length"], to=TensorProto.INT32),
    ]
    past = ["past_key_values.0.key", "past_key_values.0.value"]
    heads = {"num_heads": HEADS, "kv_num_heads": PAIRS}
    like: dict[str, Any] = {
        "k": 2,
        "activation_type": "swiglu",
        "activation_alpha": 1.702,
        "activation_beta": 1.0,
        "swiglu_limit": 7.0,
    }
    like |= {"swiglu_fusion": 1, "normalize_routing_weights": 1}
    return [
        *lengths,
        helper.make_node("Gather", ["words", "input_ids"], ["h"]),
        helper.make_node("SimplifiedLayerNormalization", ["h", "norm"], ["normed"], epsilon=1e-5),
        helper.make_node("MatMul", ["normed", "qkv"], ["packed"]),
        own(
            "GroupQueryAttention",
            ["packed", "", "", *past, "seqlens_k", "total_length"],
            ["attended", "present.0.key", "present.0.value"],
            **heads,
        ),
        helper.make_node("MatMul", ["attended", "out"], ["projected"]),
        own("SkipSimplifiedLayerNormalization", ["h", "projected", "norm"], ["x", "", "", "residual"], epsilon=1e-5),
        helper.make_node("MatMul", ["x", "gate"], ["scores"]),
        helper.make_node("Reshape", ["scores", "flat"], ["router"]),
        own("MoE", ["x", "router", "w1", "b1", "w2", "b2"], ["y"], **like),
        helper.make_node("Add", ["residual", "y"], ["behind"]),
        helper.make_node("MatMul", ["behind", "head"], ["logits"]),
    ]
