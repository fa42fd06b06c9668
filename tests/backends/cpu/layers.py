"""Layers of experts over tensors, run in each of the fast ways and by the ops' meaning.

T tokens, K experts per token, E experts, D model width, F expert width, O output width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from moec.backends.cpu.activation import FastActivation
from moec.backends.cpu.choose import BATCH, EACH, PAIRS, TABLES
from moec.backends.cpu.expert_ffn import run_experts
from moec.backends.cpu.machine import machine
from moec.backends.cpu.operands import Layer, expert_layer
from moec.backends.cpu.pack import Packed, pack_as
from moec.backends.reference.frame import Frame
from moec.backends.reference.joined import Experts
from moec.backends.reference.table import MEANINGS
from moec.ir import Builder, ExpertFfn, Tensor, Value

PACKED = "packed"
WAYS = (EACH, PAIRS, BATCH, TABLES, PACKED)
NAMES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16", torch.int8: "i8"}


@dataclass
class Case:
    """One expert_ffn with its weights."""

    op: ExpertFfn
    weights: dict[str, Experts]
    dtype: torch.dtype
    experts: int
    layer: Layer = field(init=False)

    def __post_init__(self) -> None:
        self.layer = expert_layer(self.op, FastActivation(self.op), Frame(dict(self.weights), {}, {}))

    def meaning(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The op by its meaning."""
        values = {**self.weights, "x": x, "experts": ids, "weights": weights}
        (y,) = MEANINGS[ExpertFfn](self.op, Frame(values, {}, {}))
        assert isinstance(y, torch.Tensor)
        return y

    def run(self, way: str | None, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The op in this way, or in the one chosen."""
        packed = Packed()
        if way == TABLES:
            packed = pack_as("tables", self.layer)
        if way == PACKED:
            packed, way = pack_as("onednn", self.layer), EACH
        return run_experts(self.layer, packed, x, ids, weights, way)

    def ways(self) -> list[str]:
        """The ways that this layer can be run in."""
        ways = [EACH]
        if self.layer.stacked and self.dtype != torch.float64:
            ways += [PAIRS, BATCH]
        if all(p.scale is None for p in self.layer.products.values()):
            ways += [TABLES] if self.dtype != torch.float64 else []
            ways += [PACKED] if machine().onednn and self.dtype in (torch.float32, torch.bfloat16) else []
        return ways


def make(
    experts: int,
    d: int,
    f: int,
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "concat",
    o: int | None = None,
    bias: bool = False,
    weights_dtype: torch.dtype = torch.float32,
    turned: bool = False,
    listed: bool = False,
    ids_dtype: str = "i64",
    seed: int = 0,
    **attributes: Any,
) -> Case:
    """A layer with random weights; `turned` ones lie transposed in memory, `listed` ones in a tensor each."""
    generator = torch.Generator().manual_seed(seed)
    o = d if o is None else o
    rows = f if layout in ("none", "pair") else 2 * f
    b = Builder("layer")
    x = b.input("x", Tensor.of(NAMES[dtype], "T", d))
    ids = b.input("experts", Tensor.of(ids_dtype, "T", "K"))
    weights = b.input("weights", Tensor.of(NAMES[weights_dtype], "T", "K"))
    found: dict[str, Experts] = {}

    def weight(name: str, *shape: int) -> Value:
        scale = shape[-1] ** -0.5 if len(shape) == 3 else 0.5
        w = torch.randn(*shape, generator=generator) * scale
        w = w.to(dtype)
        if turned and w.dim() == 3:
            w = w.transpose(1, 2).contiguous().transpose(1, 2)
        found[name] = [e.clone(memory_format=torch.preserve_format) for e in w] if listed else w
        return b.input(name, Tensor.of(NAMES[dtype], *shape))

    more: Mapping[str, Value] = {}
    if layout == "pair":
        more = {**more, "w_up": weight("w_up", experts, f, d)}
        if bias:
            more = {**more, "b_up": weight("b_up", experts, f)}
    if bias:
        more = {**more, "b_in": weight("b_in", experts, rows), "b_out": weight("b_out", experts, o)}
    w_in, w_out = weight("w_in", experts, rows, d), weight("w_out", experts, o, f)
    op = ExpertFfn(x, ids, weights, w_in, w_out, layout=layout, **{"fn": "silu", **attributes}, **more)
    op.result_types()
    return Case(op, found, dtype, experts)


def inputs(
    case: Case, tokens: int, k: int, *, seed: int = 1, weights_dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, distinct experts of each token where there are enough, and weights that sum to one."""
    generator = torch.Generator().manual_seed(seed)
    d = case.op.x.type.shape[1].constant
    assert d is not None
    x = torch.randn(tokens, d, generator=generator).to(case.dtype)
    logits = torch.randn(tokens, case.experts, generator=generator)
    if k <= case.experts:
        ids = logits.topk(k, dim=1).indices
    else:
        ids = torch.randint(0, case.experts, (tokens, k), generator=generator)
    weights = torch.rand(tokens, k, generator=generator).softmax(1).to(weights_dtype)
    return x, ids, weights


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The larger of relative L2 and relative maximum; infinite where other values are not finite."""
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    a, b = found.double(), wanted.double()
    finite = b.isfinite()
    if not torch.equal(a.isfinite(), finite) or not torch.equal(a.isnan(), b.isnan()):
        return float("inf")
    a, b = a[finite], b[finite]
    if a.numel() == 0 or bool((a == b).all()):
        return 0.0
    gap = a - b
    return float(max(gap.norm() / b.norm(), gap.abs().max() / b.abs().max()))


BARS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}
