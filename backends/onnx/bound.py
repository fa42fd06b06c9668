"""ONNX Runtime sessions that read and write torch's own memory, on the CPU or on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moec.backends.onnx.emitter import DTYPES
from moec.backends.onnx.runtime import run
from moec.backends.reference.dtypes import DTYPES as TORCH_DTYPES

_KINDS = {TORCH_DTYPES[name]: int(kind) for name, kind in DTYPES.items()}


def run_bound(
    session: Any,
    given: Sequence[tuple[str, torch.Tensor]],
    outputs: Sequence[tuple[str, torch.Tensor]],
) -> None:
    """Run on tensors by the names of inputs, into tensors by the names of outputs, all contiguous; without copies where
    they are where the session runs.

    On a GPU it waits for what torch has queued before, and is done when it returns.
    """
    if not all(tensor.numel() for _, tensor in (*given, *outputs)):
        _run_empty(session, given, outputs)
        return
    device = outputs[0][1].device
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    binding = session.io_binding()
    for bind, pairs in ((binding.bind_input, given), (binding.bind_output, outputs)):
        for name, tensor in pairs:
            where = tensor.device
            bind(name, where.type, where.index or 0, _KINDS[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
    session.run_with_iobinding(binding)


def run_tensors(session: Any, given: Mapping[str, torch.Tensor]) -> list[torch.Tensor] | None:
    """All outputs of a session, on the inputs' device and in ONNX Runtime's own memory, without copies.

    None where tensors cannot be handed over: without elements, or of a type that the IR does not have.
    """
    tensors = {name: tensor.detach().contiguous() for name, tensor in given.items()}
    if not tensors or not all(tensor.numel() and tensor.dtype in _KINDS for tensor in tensors.values()):
        return None
    device = next((one.device for one in tensors.values() if one.device.type == "cuda"), torch.device("cpu"))
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    binding = session.io_binding()
    for name, tensor in tensors.items():
        where = tensor.device
        binding.bind_input(
            name, where.type, where.index or 0, _KINDS[tensor.dtype], tuple(tensor.shape), tensor.data_ptr()
        )
    for output in session.get_outputs():
        binding.bind_output(output.name, device.type, device.index or 0)
    session.run_with_iobinding(binding)
    return [torch.utils.dlpack.from_dlpack(value) for value in binding.get_outputs()]


def run_in_order(session: Any, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Results for inputs in the session's order, on the CPU; numpy, which `run` goes through, has no bf16."""
    told = session.get_inputs()
    if not any("bfloat16" in one.type for one in (*told, *session.get_outputs())):
        return run(session, inputs)
    found = run_tensors(session, {one.name: tensor for one, tensor in zip(told, inputs, strict=True)})
    if found is None:
        raise ValueError("inputs without elements, or of a type that is not handed over")
    return [tensor.cpu() for tensor in found]


def _run_empty(
    session: Any, given: Sequence[tuple[str, torch.Tensor]], outputs: Sequence[tuple[str, torch.Tensor]]
) -> None:
    """What has no elements has no address to bind; numpy, which these go through, has no bf16."""
    if any(tensor.dtype == torch.bfloat16 for _, tensor in (*given, *outputs)):
        for _, output in outputs:
            output.zero_()
        return
    found = run(session, [tensor.cpu() for _, tensor in given])
    for (_, output), one in zip(outputs, found, strict=True):
        output.copy_(one)
