"""Fused experts and FFNs as Triton kernels on NVIDIA GPUs."""

from moec.backends.triton.backend import backend, why_not

__all__ = ["backend", "why_not"]
