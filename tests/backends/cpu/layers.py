"""Layers of experts over tensors, run in each of the fast ways and by the ops' meaning.

T tokens, K experts per token, E experts, D model width, F expert width, O output width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from moec.backends.cpu.activation import FastActivation
from moec.backends.cpu.choose import BATCH, EACH, FEW, GROUPED, TABLES
from moec.backends.cpu.each import Ways
from moec.backends.cpu.expert_ffn import run_experts
from moec.backends.cpu.grouped import fits_grouped
from moec.backends.cpu.machine import machine
from moec.backends.cpu.operands import Layer, Sizes, expert_layer
from moec.backends.cpu.pack import Packed, pack_as
from moec.backends.reference.activations import act, split
from moec.backends.reference.frame import Frame
from moec.backends.reference.joined import Experts
from moec.backends.reference.table import MEANINGS
from moec.ir import Builder, ExpertFfn, Tensor, Value
from tests.backends.ffn_op import expert_ffn

PACKED = "packed"
WAYS = (EACH, FEW, BATCH, GROUPED, TABLES, PACKED)
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
        self.layer = expert_layer(
            self.op, FastActivation(self.op), Sizes.of(self.op), Frame(dict(self.weights), {}, {})
        )

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
        ways = [EACH] + [FEW] * Ways(machine()).plain(self.layer, self.dtype, 1)
        if self.layer.stacked and self.dtype != torch.float64:
            ways += [BATCH] + [GROUPED] * fits_grouped(self.layer)
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
    b = Builder("layer")
    found: dict[str, Experts] = {}

    def weight(name: str, *shape: int) -> Value:
        scale = shape[-1] ** -0.5 if len(shape) == 3 else 0.5
        w = torch.randn(*shape, generator=generator) * scale
        w = w.to(dtype)
        if turned and w.dim() == 3:
            w = w.transpose(1, 2).contiguous().transpose(1, 2)
        found[name] = [e.clone(memory_format=torch.preserve_format) for e in w] if listed else w
        return b.input(name, Tensor.of(NAMES[dtype], *shape))

    sizes, dtypes = (experts, d, f, d if o is None else o), (NAMES[dtype], ids_dtype, NAMES[weights_dtype])
    op = expert_ffn(b, weight, sizes, dtypes, layout=layout, bias=bias, **attributes)
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


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative L2 over what is finite."""
    finite = wanted.isfinite()
    a, b = found.double()[finite], wanted.double()[finite]
    return float((a - b).norm() / b.norm()) if bool(b.any()) else float((a - b).norm())


def eager(case: Case, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The op as models spell it: expert by expert in x's own dtype, rounding after every operation."""
    w = case.weights
    y = x.new_zeros(x.shape[0], case.layer.sizes.width_out)
    for e in range(case.experts):
        tokens, choices = (ids == e).nonzero(as_tuple=True)
        rows = x[tokens]
        h = F.linear(rows, w["w_in"][e], w["b_in"][e] if "b_in" in w else None)
        if case.op.layout == "pair":
            up = F.linear(rows, w["w_up"][e], w["b_up"][e] if "b_up" in w else None)
            a = act(h, case.op) * up
        elif case.op.layout == "none":
            a = act(h, case.op)
        else:
            gate, up = split(h, case.op.layout)
            a = act(gate, case.op) * up
        out = F.linear(a, w["w_out"][e], w["b_out"][e] if "b_out" in w else None)
        y.index_add_(0, tokens, (out * weights[tokens, choices, None]).to(y.dtype))
    return y


BARS = {torch.float64: 1e-12, torch.float32: 2e-6}


def assert_right(
    case: Case, way: str | None, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The way's result, which is within the bar for its dtype of the meaning's."""
    found, wanted = case.run(way, x, ids, weights), case.meaning(x, ids, weights)
    gap = error(found, wanted)
    if case.dtype in BARS:
        assert gap <= BARS[case.dtype], f"{way}: error {gap:.1e}"
    else:
        # Compared with fp32, 16 bits may be off by no more than 1.5 times what the model's own code is off by; a few
        # numbers may be luckier than that.
        own = distance(eager(case, x, ids, weights), wanted)
        gap = max(distance(found, wanted), 0.0 if gap < 1 else gap)
        luck = 0.0 if wanted.numel() > 500 else torch.finfo(case.dtype).eps
        assert gap <= 1.5 * own + luck, f"{way}: error {gap:.1e}, eager {own:.1e}"
    return found
