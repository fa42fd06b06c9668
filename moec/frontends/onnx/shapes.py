"""Types and sizes of a graph's values, where they follow from its inputs."""

from __future__ import annotations

import logging
from typing import Any


def infer_shapes(model: Any) -> None:
    """Fill them in, in place. What ONNX cannot infer, such as types its own ops do not take, is left as it is."""
    from onnx_ir.passes import common

    logger = logging.getLogger("onnx_ir.passes.common.shape_inference")
    before = logger.disabled
    logger.disabled = True  # it prints a traceback, and ONNX Runtime will say what is wrong
    try:
        common.ShapeInferencePass()(model)
    finally:
        logger.disabled = before
