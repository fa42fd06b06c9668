"""What exports are checked on: routings that are easy to get wrong, and shapes that were not traced.

T tokens, K experts per token, E experts, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from moec.backends.reference.dtypes import DTYPES
from moec.ir import ExpertFfn, Group, Region, Route, Value
from moec.ir.types import INDICES

Tensors = list[torch.Tensor]


def num_experts(region: Region) -> int:
    """E of a region with experts, 1 of a dense one."""
    for node in region.nodes:
        if isinstance(node.op, ExpertFfn):
            return node.op.w_in.type.shape[0].constant or 1
        if isinstance(node.op, Group):
            return node.op.experts
    return 1


def region_probes(region: Region, *, nonnegative: bool = False) -> Iterator[tuple[str, Tensors]]:
    """Inputs of a region by what is odd about them; routers' weights of either sign, or `nonnegative` ones."""
    for label, inputs in _region_probes(region):
        yield label, [*inputs[:2], *(weights.abs() for weights in inputs[2:])] if nonnegative else inputs


def _region_probes(region: Region) -> Iterator[tuple[str, Tensors]]:
    experts = num_experts(region)
    generator = torch.Generator().manual_seed(0)
    for tokens in (1, 2, 7, 33, 200):
        yield f"{tokens} tokens", _inputs(region, tokens, experts, generator)
    for label, expert in (("all on the first expert", 0), ("all on the last expert", experts - 1)):
        yield label, _with_ids(region, 16, experts, generator, expert)
    yield "no token has an expert", _with_ids(region, 5, experts, generator, experts)
    tied = _inputs(region, 12, experts, generator)
    yield (
        "equal tokens",
        [t if _is_ids(v) else t[:1].expand_as(t).contiguous() for v, t in zip(region.inputs, tied, strict=True)],
    )
    for scale in (0.05, 20.0):
        found = _inputs(region, 9, experts, generator)
        yield f"scale {scale:g}", [found[0] * scale, *found[1:]]
    if any(isinstance(node.op, Route) for node in region.nodes):
        yield from _logits_probes(region, generator)


def _logits_probes(region: Region, generator: torch.Generator) -> Iterator[tuple[str, Tensors]]:
    """Logits that are easy to get wrong, for a region that routes by itself: x[T, D], logits[T, E]."""
    experts = num_experts(region)
    x, logits = _inputs(region, 64, experts, generator)
    yield "equal logits", [x, torch.zeros_like(logits)]
    yield "logits with ties", [x, (2 * logits).round()]
    yield "large logits", [x, logits * 60]
    for label, expert in (("first", 0), ("last", experts - 1)):
        yield f"logits for the {label} expert", [x, logits + 40 * (torch.arange(experts) == expert).to(logits.dtype)]


def inputs_of(region: Region, tokens: int) -> Tensors:
    """Random inputs, distinct experts for each token, and weights that are not negative."""
    found = _inputs(region, tokens, num_experts(region), torch.Generator().manual_seed(0))
    return [*found[:2], *(weights.abs() for weights in found[2:])]


def _is_ids(value: Value) -> bool:
    return value.type.dtype in INDICES


def _inputs(region: Region, tokens: int, experts: int, generator: torch.Generator) -> Tensors:
    return [_tensor(value, tokens, experts, generator) for value in region.inputs]


def _with_ids(region: Region, tokens: int, experts: int, generator: torch.Generator, expert: int) -> Tensors:
    found = _inputs(region, tokens, experts, generator)
    return [torch.full_like(t, expert) if _is_ids(v) else t for v, t in zip(region.inputs, found, strict=True)]


def _tensor(value: Value, tokens: int, experts: int, generator: torch.Generator) -> torch.Tensor:
    """One input: distinct experts for each token, anything else random."""
    shape = value.type.evaluate(dict.fromkeys(value.type.letters, tokens))
    dtype = DTYPES[value.type.dtype]
    if _is_ids(value):
        order = torch.rand(shape[0], max(experts, shape[1]), generator=generator).argsort(1)
        return (order[:, : shape[1]] % (experts + int(shape[1] > experts))).to(dtype)
    return torch.randn(shape, generator=generator).to(dtype)


SIZES = ((1, 1), (1, 3), (3, 5), (2, 17), (1, 65))
"""First and other dynamic sizes of a whole model's inputs."""


def model_probes(
    names: Sequence[str], tensors: Sequence[torch.Tensor], shapes: Mapping[str, Sequence[int | str]]
) -> Iterator[tuple[str, Tensors]]:
    """Inputs like the example ones in other sizes, made of the example's own values; `shapes` names dynamic sizes."""
    letters = list(dict.fromkeys(size for name in names for size in shapes[name] if isinstance(size, str)))
    seen = set()
    for first, rest in SIZES:
        sizes = {letter: first if index == 0 and len(letters) > 1 else rest for index, letter in enumerate(letters)}
        label = " ".join(f"{letter}={size}" for letter, size in sizes.items()) or "its own shape"
        if label not in seen:
            seen.add(label)
            shaped = {name: [sizes[size] if isinstance(size, str) else size for size in shapes[name]] for name in names}
            yield label, [sampled(tensor, shaped[name]) for name, tensor in zip(names, tensors, strict=True)]


def sampled(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A tensor of this shape whose elements are drawn from another one, whole rows where the last size is kept."""
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    if not tensor.dim() or not tensor.numel():
        return tensor.clone()
    if tensor.is_floating_point() and tensor.dim() > 1 and tensor.shape[-1] == shape[-1]:
        rows = tensor.reshape(-1, shape[-1])
        count = 1
        for size in shape[:-1]:
            count *= size
        found = rows[torch.randint(len(rows), (count,), generator=generator)]
        # Some noise, so that rows are not equal.
        return (found + 0.1 * found.std() * torch.randn(found.shape, generator=generator).to(found)).reshape(*shape)
    flat = tensor.flatten()
    return flat[torch.randint(len(flat), tuple(shape), generator=generator)]
