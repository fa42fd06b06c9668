"""Element types of the IR as torch's, and the type that sums are kept in."""

from __future__ import annotations

import torch

DTYPES: dict[str, torch.dtype] = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i8": torch.int8,
    "i32": torch.int32,
    "i64": torch.int64,
    "bool": torch.bool,
}


def wide(*tensors: torch.Tensor) -> torch.dtype:
    """f64 if any of the tensors holds it, else f32: what sums of their elements are kept in."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def described(found: torch.Tensor) -> str:
    """A tensor's element type and shape as the IR writes types."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    return f"{names.get(found.dtype, found.dtype)}{list(found.shape)}"
