"""Marks: one custom op in the place of each layer, which passes through torch.export and becomes one ONNX node.

T tokens, K experts per token, D inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch

DOMAIN = "moec"
EXPERTS, FFN = "Experts", "Ffn"


@torch.library.custom_op("moec::experts", mutates_args=())
def experts_mark(x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, layer: str, width: int) -> torch.Tensor:
    """x[T, D], experts[T, K], weights[T, K] -> [T, O]: the experts of `layer`, which stand here until lowered."""
    raise NotImplementedError(f"the mark of {layer} only stands in graphs that are being exported")


@experts_mark.register_fake
def _(x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, layer: str, width: int) -> torch.Tensor:
    return x.new_empty(x.shape[0], width)


@torch.library.custom_op("moec::ffn", mutates_args=())
def ffn_mark(x: torch.Tensor, layer: str, width: int) -> torch.Tensor:
    """x[T, D] -> [T, O]: the FFN of `layer`, which stands here until lowered."""
    raise NotImplementedError(f"the mark of {layer} only stands in graphs that are being exported")


@ffn_mark.register_fake
def _(x: torch.Tensor, layer: str, width: int) -> torch.Tensor:
    return x.new_empty(x.shape[0], width)


def translations() -> dict[Any, Any]:
    """For torch.onnx.export: each mark becomes one node of moec's domain."""
    from onnxscript import values

    domain = values.Opset(DOMAIN, 1)
    experts = values.Op(domain, EXPERTS, _schema(EXPERTS, "x", "experts", "weights"))
    ffn = values.Op(domain, FFN, _schema(FFN, "x"))

    def translate_experts(x: Any, ids: Any, weights: Any, layer: str, width: int) -> Any:
        return experts(x, ids, weights, layer=layer, width=width)

    def translate_ffn(x: Any, layer: str, width: int) -> Any:
        return ffn(x, layer=layer, width=width)

    return {torch.ops.moec.experts.default: translate_experts, torch.ops.moec.ffn.default: translate_ffn}


def _schema(name: str, *inputs: str) -> Any:
    """onnxscript needs a schema for ops that ONNX does not have."""
    from onnx import defs

    schema = defs.OpSchema
    floats = ["tensor(float)", "tensor(double)", "tensor(float16)", "tensor(bfloat16)"]
    kinds = {"experts": "I", "weights": "W"}
    return schema(
        name,
        DOMAIN,
        1,
        inputs=[schema.FormalParameter(one, kinds.get(one, "T")) for one in inputs],
        outputs=[schema.FormalParameter("y", "T")],
        type_constraints=[("T", floats, ""), ("W", floats, ""), ("I", ["tensor(int64)", "tensor(int32)"], "")][
            : 1 if len(inputs) == 1 else 3
        ],
        attributes=[
            schema.Attribute("layer", schema.AttrType.STRING, ""),
            schema.Attribute("width", schema.AttrType.INT, ""),
        ],
    )
