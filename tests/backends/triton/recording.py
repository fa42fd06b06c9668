"""Layers of experts whose gradients are recorded, with the same by autograd through plain torch.

T tokens, K experts per token, E experts, D model width, F expert width, O output width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from moec.backendbase import load_backend
from moec.backends.reference.activations import act, split
from moec.backends.triton.recording import RecordingExecutable
from moec.ir import Builder, ExpertFfn, Region, Tensor, Value, Weight
from tests.backends.ffn_op import expert_ffn
from tests.backends.running import NAMES, Weights

Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass
class Layer:
    """A region of one expert_ffn and its parameters."""

    region: Region
    op: ExpertFfn
    weights: Weights
    dtype: torch.dtype
    e: int
    d: int
    o: int

    def executable(self) -> RecordingExecutable:
        """The layer by kernels."""
        found = load_backend("triton").recording(self.region, self.weights.store())  # type: ignore[attr-defined]
        assert isinstance(found, RecordingExecutable), found
        return found

    def inputs(self, tokens: int, k: int, seed: int = 0, weights_dtype: torch.dtype = torch.float32) -> Given:
        """x, different experts of each token where there are enough, and weights that sum to one."""
        device = next(iter(self.weights.params.values())).device
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(tokens, self.d, generator=generator).to(self.dtype)
        ids = torch.stack([torch.randperm(max(self.e, k), generator=generator)[:k] for _ in range(tokens)]) % self.e
        weights = torch.rand(tokens, k, generator=generator).softmax(1).to(weights_dtype)
        return x.to(device), ids.to(device), weights.to(device)

    def plain(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, params: Mapping[str, Any]) -> Any:
        """The op as models spell it, in x's dtype."""

        def of(role: str, e: int) -> Any:
            if role not in self.weights.views:
                return None
            view = self.weights.views[role][e]  # type: ignore[index]
            p = params[view.param]
            return p.as_strided(view.shape, view.stride, p.storage_offset() + view.offset)

        y = x.new_zeros(x.shape[0], self.o)
        for e in range(self.e):
            token, choice = (ids == e).nonzero(as_tuple=True)
            h = F.linear(x[token], of("w_in", e), of("b_in", e))
            if self.op.layout == "none":
                a = act(h, self.op)
            else:
                two = split(h, self.op.layout) if self.op.layout != "pair" else None
                gate, up = two or (h, F.linear(x[token], of("w_up", e), of("b_up", e)))
                if self.op.limit is not None:
                    up = up.clamp(-self.op.limit, self.op.limit)
                a = act(gate, self.op) * (up + self.op.up_shift)
            out = F.linear(a, of("w_out", e), of("b_out", e)) * weights[token, choice, None].to(x.dtype)
            y = y.index_add(0, token, out)
        return y


def make(
    e: int,
    d: int,
    f: int,
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "concat",
    o: int | None = None,
    bias: bool = False,
    turned: bool = False,
    separate: bool = False,
    device: torch.device,
    weights_dtype: torch.dtype = torch.float32,
    **attributes: Any,
) -> Layer:
    """A layer with random weights; `turned` ones lie transposed in memory, `separate` ones in a parameter each."""
    o = d if o is None else o
    b = Builder("layer")
    found = Weights()

    def weight(name: str, *shape: int) -> Value:
        w = (torch.randn(*shape) * (shape[-1] ** -0.5 if len(shape) == 3 else 0.5)).to(device, dtype)
        if turned and w.dim() == 3:
            w = w.transpose(1, 2).contiguous().transpose(1, 2)
        (found.separate if separate else found.stacked)(name, w)
        return b.add(Weight(ref=name, type=Tensor.of(NAMES[dtype], *shape)))

    dtypes = NAMES[dtype], "i64", NAMES[weights_dtype]
    op = expert_ffn(b, weight, (e, d, f, o), dtypes, layout=layout, bias=bias, **attributes)
    for p in found.params.values():
        p.requires_grad_()
    return Layer(b.build(b.add(op)), op, found, dtype, e, d, o)


def gradients(run: Any, given: Given, params: Mapping[str, torch.Tensor], dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """The result, and the gradients of x, routing weights and parameters, for the gradient dy[T, O] of the result."""
    x, ids, weights = given
    x, weights = x.detach().clone().requires_grad_(), weights.detach().clone().requires_grad_()
    (y,) = run(x, ids, weights)
    wanted = [x, weights, *params.values()]
    found: Sequence[torch.Tensor | None] = torch.autograd.grad(y, wanted, dy.to(y.dtype), allow_unused=True)
    whole = [torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True)]
    return {"y": y.detach(), **dict(zip(["x", "weights", *params], whole, strict=True))}


def by_kernels(layer: Layer, given: Given, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """By the layer's kernels."""
    return gradients(layer.executable(), given, layer.weights.params, dy)


def by_torch(layer: Layer, given: Given, dy: torch.Tensor, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """By autograd, in another element type if one is given."""
    dtype = dtype or layer.dtype
    params = {name: p.detach().to(dtype).requires_grad_() for name, p in layer.weights.params.items()}
    x, ids, weights = given
    given = x.to(dtype), ids, weights.to(dtype) if dtype == torch.float64 else weights
    return gradients(lambda x, ids, weights: (layer.plain(x, ids, weights, params),), given, params, dy)


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """||a - b|| / ||b||, or ||a|| where b is zero."""
    a, b = found.double(), wanted.double()
    return float((a - b).norm() / b.norm()) if bool(b.any()) else float(a.norm())
