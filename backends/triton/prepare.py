"""A fused op made ready to run on one GPU: `prepare` once per weights, then call with tokens.

T tokens, K experts per token, E experts, D model width, O output width.
"""

from __future__ import annotations

from typing import Any

import torch

from moec.backends.triton.choose import Plan, Shape, choose
from moec.backends.triton.gpu import GpuFacts, gpu_facts
from moec.backends.triton.launch import Launch
from moec.backends.triton.operands import Operands
from moec.backends.triton.pack import bytes_to_pack
from moec.backends.triton.pack import pack as pack_experts
from moec.backends.triton.paths import make_run
from moec.backends.triton.site import Run, Site
from moec.backends.triton.spec import Layer, layer_of
from moec.backends.triton.store import lookup
from moec.ir import DenseFfn, ExpertFfn

KEPT_RUNS = 4096
"""Numbers of tokens whose launches are kept; all are dropped when there are more."""


def prepare(op: ExpertFfn | DenseFfn, operands: Operands, device: torch.device, *, pack: bool = False) -> Prepared:
    """Kernels for an op over these weights, read through their addresses at each call.

    Prepare again when a weight's storage, shape or strides changed. Raises CannotPrepareError with the reason where
    the kernels cannot read the weights. `pack` copies experts that are a tensor each into one piece of memory.
    """
    size = bytes_to_pack(operands) if pack else 0
    operands = pack_experts(operands) if size else operands
    if str(device) == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    found = Prepared(layer_of(op, operands, device), gpu_facts(device), device)
    found.nbytes_packed = size
    return found


class Prepared:
    """The kernels of one fused op. Calls work on the current stream and never wait for the device."""

    nbytes_packed = 0
    """Bytes of copies of weights."""

    def __init__(self, layer: Layer, facts: GpuFacts, device: torch.device) -> None:
        self.layer, self.facts, self.device = layer, facts, device
        self.shape = Shape(*layer.key)
        self._runs: dict[Any, Run] = {}
        self._made: dict[Any, Any] = {}
        self._ones: list[torch.Tensor] = []

    def plan(self, tokens: int, k: int = 1) -> Plan:
        """Path and tiles that a number of tokens gets: measured here, shipped, or by the cost model."""
        found = lookup(self.shape, k, tokens, self.facts.name) if tokens else None
        return found or choose(self.shape, tokens, k, self.facts)

    def __call__(
        self,
        x: torch.Tensor,
        ids: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        *,
        valid: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        plan: Plan | None = None,
    ) -> torch.Tensor:
        """x[T, D], ids[T, K], weights[T, K] -> [T, O]. Without ids every row goes to the first expert, unweighted.

        `valid`, one integer on the device, is how many of the rows count; the others come out as zeros. Ids outside
        0..E-1 contribute nothing. `plan` overrides the choice.
        """
        tokens = x.shape[0]
        if out is None:
            out = x.new_empty((tokens, self.layer.o))
        if tokens == 0:
            return out
        if ids is None:
            ids = self.first_expert(tokens)
        if ids.shape[1] == 0:
            return out.zero_()
        x, ids = dense(x), ids.contiguous()
        weights = None if weights is None else weights.contiguous()
        self.run_for(x, ids, weights, valid=valid, plan=plan)(x, ids, weights, valid, out)
        return out

    def run_for(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor | None,
        *,
        valid: torch.Tensor | None = None,
        plan: Plan | None = None,
    ) -> Run:
        """The launches for inputs like these."""
        key = (ids.shape, ids.dtype, _type(weights), _type(valid), plan)
        run = self._runs.get(key) if x.dtype != torch.float32 else None
        return run or self._make(key, ids, weights, valid, plan)

    def _make(
        self,
        key: tuple[Any, ...],
        ids: torch.Tensor,
        weights: torch.Tensor | None,
        valid: torch.Tensor | None,
        plan: Plan | None,
    ) -> Run:
        precision, (tokens, k) = self.precision(), ids.shape
        made = self.launches(*key[1:4], precision)
        site = Site(self.layer, self.facts, k, weights is not None, valid is not None, precision, made)
        if len(self._runs) >= KEPT_RUNS:
            self._runs.clear()
        run = self._runs[key] = make_run(site, plan or self.plan(tokens, k), tokens)
        return run

    def precision(self) -> str:
        """Of products now: ieee or tf32, or wide in the interpreter."""
        if self.facts.interpreted:
            return "wide"
        tf32 = self.layer.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
        return "tf32" if tf32 else "ieee"

    def launches(self, *kind: Any) -> dict[Any, Launch]:
        """Launches made so far for inputs of a kind: numbers of tokens share them, other element types do not."""
        return self._made.setdefault(kind, {})  # type: ignore[no-any-return]

    def forget(self) -> None:
        """Drop the launches made so far, so that newly measured plans are taken."""
        self._runs.clear()

    def first_expert(self, tokens: int) -> torch.Tensor:
        """ids[T, 1] of one expert. None is ever given back to the allocator: graphs that were captured may read it."""
        if not self._ones or self._ones[-1].shape[0] < tokens:
            size = 1 << (tokens - 1).bit_length()
            found = torch.zeros(size, 1, dtype=torch.int32, device=self.device)
            if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return found[:tokens]  # which belongs to the graph being captured
            self._ones.append(found)
        return self._ones[-1][:tokens]


def dense(x: torch.Tensor) -> torch.Tensor:
    """x with rows one after the other from a multiple of 16 bytes on, which compiled kernels count on."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _type(x: torch.Tensor | None) -> torch.dtype | None:
    return None if x is None else x.dtype
