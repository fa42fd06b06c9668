"""Triton kernels of a layer of experts, one theme a file, each with what it reads, writes and assumes."""
