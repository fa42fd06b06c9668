"""Regions as ONNX graphs, and ONNX Runtime to run them. The libraries are imported when first needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from moec.backendbase import Backend


def backend() -> Backend:
    """What `load_backend("onnxruntime")` gives."""
    from moec.backends.onnx.ort import OnnxRuntime

    return OnnxRuntime()


def why_not(device: torch.device) -> str:
    """Why it cannot run layers on this device; empty if it can."""
    from importlib.util import find_spec

    missing = [name for name in ("onnx", "onnx_ir", "onnxruntime") if find_spec(name) is None]
    if missing:
        return f"{', '.join(missing)} cannot be imported (pip install 'moec[onnx]')"
    from moec.backends.onnx.providers import check_installed, why_no_cuda

    check_installed()
    if device.type == "cuda":
        return why_no_cuda()
    return "" if device.type == "cpu" else f"the layers are on {device.type}, and it runs on CPUs and NVIDIA GPUs"
