"""Who takes part in gpu_experts.py: ways to compute one layer of experts on a GPU, behind one registry.

A contestant is made for a layer once and then called with x[T, D], ids[T, K] and weights[T, K]. Those that need a
package which is not installed, or a form that they do not know, say so and are left out of that layer.
E experts, D model width, F expert width.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moec.backendbase import Executable, load_backend
from moec.ir import Builder, ExpertFfn, Region, Tensor, Weight
from moec.weights import View, WeightStore

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}
# Beyond this, copying the weights of every token's experts only shows that it should not have been chosen.
MAX_COPIED = 8 * 2**30
Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Unfit(Exception):  # noqa: N818 - it is no error
    """Why a contestant does not take part."""


@dataclass(frozen=True)
class Shape:
    """One layer, written like E8k2D4096F14336, E8k2D4096F14336-gelu or, without a gate, E64k1D768F3072-relu-plain."""

    experts: int
    k: int
    d: int
    f: int
    fn: str = "silu"
    gated: bool = True

    @classmethod
    def parse(cls, text: str) -> Shape:
        found = re.fullmatch(r"E(\d+)k(\d+)D(\d+)F(\d+)(?:-(silu|gelu|relu))?(-plain)?", text)
        if found is None:
            raise ValueError(f"{text!r} is no layer; write it like E8k2D4096F14336 or E64k1D768F3072-relu-plain")
        *sizes, fn, plain = found.groups()
        return cls(*map(int, sizes), fn or "silu", plain is None)

    def __str__(self) -> str:
        tail = (f"-{self.fn}" if self.fn != "silu" or not self.gated else "") + ("" if self.gated else "-plain")
        return f"E{self.experts}k{self.k}D{self.d}F{self.f}{tail}"

    @property
    def matrices(self) -> int:
        return 3 if self.gated else 2


class Layer(nn.Module):
    """The weights: first[E, 2F or F, D], gate above up, and second[E, D, F]; outputs have the size of inputs."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str = "cuda") -> None:
        super().__init__()
        self.shape = shape
        rows = 2 * shape.f if shape.gated else shape.f
        for name, size in (("first", (rows, shape.d)), ("second", (shape.d, shape.f))):
            w = torch.empty(shape.experts, *size, dtype=dtype, device=device)
            for e in range(shape.experts):
                w[e].normal_(std=size[1] ** -0.5)
            self.register_parameter(name, nn.Parameter(w, requires_grad=False))

    def expert(self, e: int, x: torch.Tensor) -> torch.Tensor:
        """x[M, D] -> [M, D] in x's own dtype."""
        first, second = self.get_parameter("first")[e], self.get_parameter("second")[e]
        h = x @ first.to(x.dtype).T
        return self.activate(h) @ second.to(x.dtype).T

    def activate(self, h: torch.Tensor) -> torch.Tensor:
        """h[..., 2F or F] -> [..., F]."""
        act = ACTIVATIONS[self.shape.fn]
        if not self.shape.gated:
            return act(h)
        gate, up = h.chunk(2, dim=-1)
        return act(gate) * up


def region(shape: Shape, dtype: str) -> Region:
    """The layer in moec's IR, as its passes leave it."""
    b = Builder("experts")
    x = b.input("x", Tensor.of(dtype, "T", shape.d))
    ids, weights = b.input("ids", Tensor.of("i64", "T", shape.k)), b.input("weights", Tensor.of("f32", "T", shape.k))
    rows = 2 * shape.f if shape.gated else shape.f
    first = b.add(Weight(ref="first", type=Tensor.of(dtype, shape.experts, rows, shape.d)))
    second = b.add(Weight(ref="second", type=Tensor.of(dtype, shape.experts, shape.d, shape.f)))
    layout = "concat" if shape.gated else "none"
    return b.build(b.add(ExpertFfn(x, ids, weights, first, second, fn=shape.fn, layout=layout)))


def store(layer: Layer) -> WeightStore:
    """The layer's weights as moec reads them."""
    views = {}
    for name in ("first", "second"):
        w = layer.get_parameter(name)
        step, *stride = w.stride()
        views[name] = tuple(View(name, e * step, tuple(w.shape[1:]), tuple(stride)) for e in range(w.shape[0]))
    return WeightStore(layer, views)


def moec_executable(layer: Layer, *, pack: bool = False, graphs: bool = False) -> Executable:
    """moec's Triton back end over the layer."""
    dtype = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}[layer.get_parameter("first").dtype]
    return load_backend("triton").build(region(layer.shape, dtype), store(layer), {}, pack=pack, graphs=graphs)


def _moec(layer: Layer) -> Call:
    run = moec_executable(layer)
    return lambda *given: run(*given)[0]


def _moec_packed(layer: Layer) -> Call:
    run = moec_executable(layer, pack=True)
    if not run.nbytes_packed:
        raise Unfit("nothing is packed for this layer")
    return lambda *given: run(*given)[0]


def _moec_list(layer: Layer) -> Call:
    """Experts that lie apart, as in a list of modules; copies them, as the layer's own lie side by side."""
    shape, dtype = layer.shape, {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
    listed = nn.Module()
    views = {}
    for name in ("first", "second"):
        weights = layer.get_parameter(name)
        found = []
        for e, w in enumerate(weights):
            # Gaps of different sizes, so that no one stride leads from expert to expert.
            room = torch.empty(w.numel() + 64 * (1 + e % 3), dtype=w.dtype, device=w.device)
            apart = room[: w.numel()].view(w.shape).copy_(w)
            listed.register_parameter(f"{name}{e}", nn.Parameter(apart, requires_grad=False))
            found.append(View(f"{name}{e}", 0, tuple(w.shape), apart.stride()))
        views[name] = tuple(found)
    element = dtype[layer.get_parameter("first").dtype]
    run = load_backend("triton").build(region(shape, element), WeightStore(listed, views), {})
    return lambda *given: run(*given)[0]


def _transformers(name: str, compiled: str = "") -> Callable[[Layer], Call]:
    def make(layer: Layer) -> Call:
        if find_spec("transformers") is None:
            raise Unfit("transformers is not installed")
        if not layer.shape.gated:
            raise Unfit("transformers' common experts have a gate")
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        shape = layer.shape
        config = MixtralConfig(
            hidden_size=shape.d, intermediate_size=shape.f, num_local_experts=shape.experts, hidden_act=shape.fn
        )
        config._experts_implementation = name
        with torch.device("meta"):
            experts = MixtralExperts(config).eval()
        experts.gate_up_proj = layer.get_parameter("first")
        experts.down_proj = layer.get_parameter("second")
        call: Call = torch.compile(experts, mode=compiled) if compiled else experts
        copied = shape.k * shape.matrices * shape.d * shape.f * layer.get_parameter("first").itemsize

        def run(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            if name == "batched_mm" and copied * x.shape[0] > MAX_COPIED:
                raise Unfit("it would copy gigabytes of weights")
            return call(x, ids, weights)

        return run

    return make


def _grouped_by_hand(layer: Layer) -> Call:
    """Sort, torch's grouped product twice, un-permute, weighted sum: what a careful user writes."""
    grouped = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if grouped is None:
        raise Unfit("this torch has no grouped product")
    first, second = (layer.get_parameter(name).transpose(1, 2) for name in ("first", "second"))
    experts = layer.shape.experts

    def run(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        tokens, k = ids.shape
        flat = ids.reshape(-1)
        order = flat.argsort(stable=True)
        ends = torch.bincount(flat, minlength=experts).cumsum(0).int()
        h = layer.activate(grouped(x[order // k], first, offs=ends))
        y = grouped(h, second, offs=ends)
        back = torch.empty_like(y)
        back[order] = y
        return torch.einsum("tkd,tk->td", back.view(tokens, k, -1), weights.to(y.dtype))

    return run


def _vllm(layer: Layer) -> Call:
    if find_spec("vllm") is None:
        raise Unfit("vllm is not installed")
    if not layer.shape.gated or layer.shape.fn != "silu":
        raise Unfit("its kernel is called with silu and a gate here")
    from vllm.model_executor.layers.fused_moe import fused_experts

    first, second = layer.get_parameter("first"), layer.get_parameter("second")
    return lambda x, ids, weights: fused_experts(x, first, second, weights, ids.int())  # type: ignore[no-any-return]


REGISTRY: dict[str, Callable[[Layer], Call]] = {
    "moec": _moec,
    "moec packed": _moec_packed,
    "moec list": _moec_list,
    "eager": _transformers("eager"),
    "batched_mm": _transformers("batched_mm"),
    "grouped_mm": _transformers("grouped_mm"),
    "batched_mm compiled": _transformers("batched_mm", "max-autotune-no-cudagraphs"),
    "grouped_mm compiled": _transformers("grouped_mm", "max-autotune-no-cudagraphs"),
    "grouped by hand": _grouped_by_hand,
    "vllm": _vllm,
}
"""By name; another contestant is one more entry."""


def make_inputs(shape: Shape, dtype: torch.dtype, tokens: int, count: int, device: str = "cuda") -> list[Inputs]:
    """Batches with slightly uneven routing, so that calls do not repeat the same experts."""
    found = []
    for seed in range(count):
        generator = torch.Generator(device).manual_seed(seed)

        def random(*size: int, generator: Any = generator) -> torch.Tensor:
            return torch.randn(*size, device=device, generator=generator)

        scores = random(tokens, shape.experts) + 0.3 * random(shape.experts)
        top = scores.topk(shape.k, dim=1)
        found.append((random(tokens, shape.d).to(dtype), top.indices, top.values.softmax(1)))
    return found
