"""Attention with a boolean mask, for torch's exporter: in passes over the mask, where its own goes over all scores.

torch's exporter looks for what is no number in every head's scores and puts zeros there, which hides what the model
computed; and a query that may look at no key gets the mean of all values, where torch gives zeros.

B batch, H heads, T queries, S keys, C a head's width.
"""

from __future__ import annotations

from typing import Any

import torch


def translations() -> dict[Any, Any]:
    """For torch.onnx.export."""
    return {torch.ops.aten.scaled_dot_product_attention.default: attention}


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """query[B, H, T, C], key and value[B, H, S, C], mask that broadcasts to [B, H, T, S] -> [B, H, T, C]."""
    import onnx_ir as ir
    from onnxscript import opset18 as op
    from onnxscript.function_libs.torch_lib.ops.nn import aten_scaled_dot_product_attention as exported

    def attend(mask: Any) -> Any:
        return exported(query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    if attn_mask is None or attn_mask.dtype != ir.DataType.BOOL:
        return attend(attn_mask)
    # Half of the least number: a score below zero beside all of it would be minus infinity in 16 bits.
    least, zero = (op.Constant(value=ir.tensor(one, dtype=query.dtype)) for one in (query.dtype.min / 2, 0.0))
    found = attend(op.Where(attn_mask, zero, least))
    # In f32, as ONNX Runtime's CPU provider reduces no 16 bits.
    seen = op.ReduceMax(op.Cast(attn_mask, to=ir.DataType.FLOAT), op.Constant(value_ints=[-1]), keepdims=1)
    return op.Mul(found, seen if query.dtype == ir.DataType.FLOAT else op.Cast(seen, to=query.dtype))
