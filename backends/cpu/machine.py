"""What this machine's CPU is good at. Nothing is timed, so that equal machines compute equal bits."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch


@dataclass(frozen=True)
class Machine:
    """What the choice of a way depends on.

    `onednn`: torch's oneDNN linear is there and right. `onednn_f32`: in fp32 it beats torch's BLAS by far, which is so
    where that is MKL on another maker's AVX-512 CPU: MKL then uses half of the width. `native`: the 16-bit types that
    products are computed in without widening the operands first.
    """

    onednn: bool
    onednn_f32: bool
    native: frozenset[torch.dtype]

    def __str__(self) -> str:
        f32 = "oneDNN" if self.onednn_f32 else "torch's BLAS"
        native = sorted(str(dtype).removeprefix("torch.") for dtype in self.native)
        packing = "oneDNN packs" if self.onednn else "no oneDNN"
        return f"fp32 products by {f32}, {' and '.join(native) or 'no 16-bit type'} native, {packing}"


def onednn_linear(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
    """x[M, C], w[N, C] plain or packed, b[N]? -> [M, N], all of one dtype."""
    # It takes any bias for a contiguous one.
    b = b if b is None else b.contiguous()
    return torch.ops.mkldnn._linear_pointwise.default(x, w, b, "none", [], "")  # type: ignore[no-any-return]


def onednn_pack(w: torch.Tensor) -> torch.Tensor:
    """w[N, C] -> the same in oneDNN's own layout, only good for `onednn_linear`."""
    # The number of rows is a hint: 64 gives a layout that is also good for 1 and for 1,000.
    return torch.ops.mkldnn._reorder_linear_weight.default(w.contiguous(), 64)  # type: ignore[no-any-return]


@lru_cache(maxsize=1)
def machine() -> Machine:
    """The machine this process runs on."""
    with torch.inference_mode(False), torch.no_grad():
        onednn = _onednn_works()
        return Machine(onednn, onednn and _mkl_is_slow(), _native())


def _onednn_works() -> bool:
    """Whether the packed product exists and gives the right numbers; it is no public interface of torch."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    x, w = torch.arange(48.0, device="cpu").view(3, 16), torch.arange(320.0, device="cpu").view(20, 16)
    try:
        packed = onednn_linear(x, onednn_pack(w))
        return torch.equal(packed, x @ w.T) and torch.equal(onednn_linear(x, w), x @ w.T)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False


def _mkl_is_slow() -> bool:
    if not torch.backends.mkl.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return "intel" not in cpu_maker().lower()


def cpu_maker() -> str:
    """The CPU's maker as it names itself, such as GenuineIntel; empty where that cannot be found out."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        # On Windows this is like "Intel64 Family 6 Model 143 Stepping 8, GenuineIntel".
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def _native() -> frozenset[torch.dtype]:
    """The 16-bit types for which torch has more than a loop on this CPU."""
    found = {
        torch.bfloat16: getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None),
        torch.float16: getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", None),
    }
    return frozenset(dtype for dtype, supported in found.items() if supported is not None and bool(supported()))
