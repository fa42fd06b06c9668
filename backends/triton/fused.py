"""The fused ops of a region run by prepared kernels: which operands they read, and when to prepare anew."""

from __future__ import annotations

from collections.abc import Mapping
from threading import Lock
from typing import Any

import torch

from moec.backends.reference.frame import Frame
from moec.backends.reference.joined import Experts
from moec.backends.reference.table import MEANINGS
from moec.backends.triton.operands import CannotPrepareError, Operands
from moec.backends.triton.pack import bytes_to_pack
from moec.backends.triton.prepare import Prepared, prepare
from moec.ir import DenseFfn, ExpertFfn

DESCRIBED = (1, 8, 64, 512, 4096)
"""Numbers of tokens whose plans are named."""
ROLES = ("w_in", "w_out", "w_up", "b_in", "b_out", "b_up", "scale_in", "scale_out", "scale_up")


class _Held:
    """Kernels prepared for these very tensors; None where the kernels cannot read them, with the reason."""

    def __init__(self, sources: list[Experts], prepared: Prepared | None, why: str) -> None:
        self.sources, self.prepared, self.why = sources, prepared, why


class TritonFused:
    """Runs one expert_ffn or dense_ffn. A frame hands in the same objects for as long as its weights lie still."""

    def __init__(self, op: ExpertFfn | DenseFfn, device: str) -> None:
        self.op, self.device = op, device
        operands = {role: getattr(op, role) for role in ROLES}
        self._names = {role: value.name for role, value in operands.items() if value is not None}
        self.k = op.experts.type.shape[1].constant or 1 if isinstance(op, ExpertFfn) else 1
        self._packs, self._nbytes_packed = False, 0
        self._held: dict[torch.device, _Held] = {}
        self._lock = Lock()

    @property
    def nbytes_packed(self) -> int:
        """Bytes of packed copies, those that the next call makes included."""
        return self._nbytes_packed

    def pack(self, at: Frame) -> None:
        """From now on run from a copy of these weights in the layout that is fastest here; the next call makes it."""
        sources = {role: at.values[name] for role, name in self._names.items()}
        operands: dict[str, Any] = dict(sources)
        with self._lock:
            self._packs, self._nbytes_packed = True, bytes_to_pack(Operands(**operands))
            self._held.clear()

    def run(self, at: Frame) -> tuple[torch.Tensor, ...]:
        """The op's result for the frame's inputs."""
        op = self.op
        x = at.tensor(op.x)
        prepared = self._prepared(at, x.device).prepared
        if prepared is None:
            return MEANINGS[type(op)](op, at)  # type: ignore[return-value]
        if isinstance(op, ExpertFfn):
            return (prepared(x, at.tensor(op.experts), at.tensor(op.weights)),)
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        y = prepared(rows)
        return (y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1]),)

    def describe(self) -> str:
        """Paths and tiles by number of tokens, or why the op runs by its meaning."""
        found = list(self._held.values())
        if not found:
            return "kernels, prepared by the first call"
        held = found[0]
        if held.prepared is None:
            return f"by its meaning: {held.why}"
        packed = f"; packed: {held.prepared.nbytes_packed:,} bytes" if held.prepared.nbytes_packed else ""
        plans = (f"T={tokens}: {held.prepared.plan(tokens, self.k)}" for tokens in DESCRIBED)
        return "; ".join(plans) + packed

    def ready(self, at: Frame) -> None:
        """Prepare for the weights in the frame."""
        self._prepared(at, at.device)

    def prepared_at(self, at: Frame, device: torch.device) -> Prepared | None:
        """The kernels of a device for the weights in the frame; None where they cannot read them."""
        return self._prepared(at, device).prepared

    def prepared_for(self, device: torch.device, values: Mapping[str, Experts] | None = None) -> Prepared | None:
        """The kernels of a device, of these very weights where some are given; None where there are none."""
        held = self._held.get(device)
        return None if held is None or (values is not None and not self._same(held, values)) else held.prepared

    def forget(self) -> None:
        """Let go of all kernels and the weights that they read."""
        self._held.clear()

    def _prepared(self, at: Frame, device: torch.device) -> _Held:
        held = self._held.get(device)
        if held is not None and self._same(held, at.values):
            return held
        with self._lock:
            held = self._held.get(device)
            return held if held is not None and self._same(held, at.values) else self._prepare(at, device)

    def _same(self, held: _Held, values: Mapping[str, Experts]) -> bool:
        return all(values[name] is source for name, source in zip(self._names.values(), held.sources, strict=True))

    def _prepare(self, at: Frame, device: torch.device) -> _Held:
        sources = [at.values[name] for name in self._names.values()]
        operands: dict[str, Any] = dict(zip(self._names, sources, strict=True))
        try:
            held = _Held(sources, prepare(self.op, Operands(**operands), device, pack=self._packs), "")
        except CannotPrepareError as error:
            held = _Held(sources, None, str(error))
        # Only of one device: weights that moved leave no copies of themselves behind.
        self._held = {device: held}
        return held
