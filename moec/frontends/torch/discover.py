"""Candidates by the geometry of their parameters alone.

Stacks [E, .., ..] or [E1, E2, .., ..], lists of equal modules, flat packs, and pairs of FFN matrices. Being a
candidate means being looked at; what a module computes is decided by running it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

_NUMBERED = re.compile(r"^(.*?)(\d+)$")
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict)
# A list whose members have more matrices than this holds whole layers (attention and all), not experts.
_MOST_MATRICES = 4


@dataclass
class Candidate:
    """A module to look at: its path, and the full names of the parameters that may be experts' (or the FFN's)."""

    name: str
    kind: Literal["moe", "ffn"]
    weights: set[str] = field(default_factory=set)
    groups: list[set[str]] = field(default_factory=list)
    """The weights by where they were found: one list of modules, one module's stacks."""


def discover_moe(model: nn.Module) -> list[Candidate]:
    """MoE candidates in the order of the model's modules."""
    return list(_without_stacks_of_layers(_all_moes(model)))


def discover_outer(model: nn.Module) -> list[Candidate]:
    """Candidates that hold others: stacks of layers, mostly, or experts that hold lists of layers, innermost first.

    A list within lists belongs to the module that holds the outermost one.
    """
    moes = _all_moes(model)
    inner = {candidate.name for candidate in _without_stacks_of_layers(moes)}
    found: dict[str, Candidate] = {}
    for name, candidate in moes.items():
        owner = name
        while owner and _is_list(model.get_submodule(owner)):
            owner = owner.rpartition(".")[0]
        if name not in inner or owner != name:
            held = found.setdefault(owner, Candidate(owner, "moe"))
            held.weights |= candidate.weights
            held.groups += candidate.groups
    return sorted(found.values(), key=lambda candidate: -candidate.name.count("."))


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.ModuleDict) and _default_forward(module)


def _all_moes(model: nn.Module) -> dict[str, Candidate]:
    moes: dict[str, Candidate] = {}
    for name, module in model.named_modules():
        for owner, weights in _experts(name, module):
            if weights:
                candidate = moes.setdefault(owner, Candidate(owner, "moe"))
                candidate.weights.update(weights)
                candidate.groups.append(weights)
    return moes


def _join(*parts: str) -> str:
    return ".".join(p for p in parts if p)


def _matrices(module: nn.Module) -> int:
    return sum(1 for p in module.parameters() if p.dim() >= 2)


def _experts(name: str, module: nn.Module) -> Iterator[tuple[str, set[str]]]:
    if type(module).__module__.startswith("torch.nn.modules") and not isinstance(module, _CONTAINERS):
        return  # torch's own layers hold kernels and projections, no experts
    own = {n: p for n, p in module._parameters.items() if p is not None}
    stacks = {n: p for n, p in own.items() if p.dim() == 3 and p.shape[0] > 1} or _of_levels(own)
    if stacks:
        yield _owner(name, module), {_join(name, n) for n in _of_experts(stacks)}
    elif not isinstance(module, _CONTAINERS) and not type(module).__module__.startswith("torch.nn"):
        flat = {n: p for n, p in own.items() if p.dim() == 2}
        if len(flat) >= 2 and len({p.shape for p in flat.values()}) == 1:
            yield name, {_join(name, n) for n in flat}
    members = _equal_members(module)
    if members:
        yield (
            _owner(name, module),
            {
                _join(name, key, n)
                for key, child in members.items()
                for n, p in child.named_parameters()
                if p.dim() == 2
            },
        )
    if isinstance(module, nn.ParameterList) and len(own) > 1 and all(p.dim() == 2 for p in own.values()):  # noqa: SIM102
        if len({p.shape for p in own.values()}) == 1:
            yield _owner(name, module), {_join(name, n) for n in own}


def _of_levels(own: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Stacks [E1, E2, .., ..] of experts at two levels: at least two of the same leading sizes, or they are kernels."""
    deep = {n: p for n, p in own.items() if p.dim() == 4 and min(p.shape[:2]) > 1}
    times = Counter(p.shape[:2] for p in deep.values())
    return {n: p for n, p in deep.items() if times[p.shape[:2]] > 1}


def _of_experts(stacks: dict[str, nn.Parameter]) -> list[str]:
    """The stacks with the number of experts that most have; a single one and what its matrices chain with."""
    experts, times = Counter(p.shape[0] for p in stacks.values()).most_common(1)[0]
    found = [n for n, p in stacks.items() if p.shape[0] == experts]
    if times > 1:
        return found
    # A stack may have places for experts without weights: gate and up for twelve, down for eight of them.
    widths = {*stacks[found[0]].shape[1:]}
    return [n for n, p in stacks.items() if n in found or len(widths & {*p.shape[1:]}) > 0]


def _owner(name: str, module: nn.Module) -> str:
    """A plain container computes nothing: the module that holds it does."""
    plain = type(module).forward in (nn.Module.forward, *(c.forward for c in _CONTAINERS if hasattr(c, "forward")))
    return (
        name.rpartition(".")[0]
        if plain or (isinstance(module, (nn.ModuleList, nn.ParameterList)) and _default_forward(module))
        else name
    )


def _default_forward(module: nn.Module) -> bool:
    return "forward" not in {
        k for cls in type(module).__mro__ if not cls.__module__.startswith("torch.") for k in vars(cls)
    }


def _equal_members(module: nn.Module) -> dict[str, nn.Module]:
    """Children that look like experts: listed, or named with a number, with parameters of equal shapes."""
    listed = isinstance(module, (nn.ModuleList, nn.ModuleDict))
    groups: dict[str, dict[str, nn.Module]] = {}
    for key, child in module._modules.items():
        # w1, w2, w3 of one FFN are numbered too: a numbered expert is more than one matrix.
        numbered = _NUMBERED.match(key) if child is not None and _matrices(child) > 1 else None
        bare = not listed or child is None or next(child.parameters(), None) is None  # a dropout is no expert
        if child is not None and (not bare or numbered):
            groups.setdefault("" if listed else numbered.group(1), {})[key] = child  # type: ignore[union-attr]
    if isinstance(module, nn.Sequential) or not groups:
        return {}
    members = max(groups.values(), key=len)
    count = {key: _matrices(child) for key, child in members.items()}
    usable = len(members) > 1 and all(0 < n <= _MOST_MATRICES for n in count.values()) and len(set(count.values())) == 1
    return members if usable else {}


def _without_stacks_of_layers(moes: dict[str, Candidate]) -> Iterator[Candidate]:
    """A list of layers that hold experts themselves is no mixture."""
    for name, candidate in moes.items():
        if not any(other != name and other.startswith(_join(name, "") + "." if name else "") for other in moes):
            yield candidate


def together(moes: Iterable[Candidate], params: Mapping[str, torch.Tensor]) -> Iterator[list[Candidate]]:
    """What to try for the same weights, all of them as one first.

    Siblings of one stack each, for equally many experts, may be layers of the same experts; several lists in one module
    may be experts and gates.
    """
    siblings: dict[tuple[str, int], list[Candidate]] = {}
    for candidate in moes:
        parent, _, own = candidate.name.rpartition(".")
        stacks = [params[name] for name in candidate.weights]
        if own and len(stacks) == 1 and stacks[0].dim() == 3:
            siblings.setdefault((parent, stacks[0].shape[0]), []).append(candidate)
        else:
            siblings[candidate.name, 0] = [candidate]
    for (parent, _), members in siblings.items():
        if len(members) in (2, 3):
            yield [Candidate(parent, "moe", set().union(*(member.weights for member in members))), *members]
            continue
        for member in members:
            parts = sorted(member.groups, key=len, reverse=True) if len(member.groups) > 1 else []
            yield [member, *(Candidate(member.name, "moe", part) for part in parts)]


def passed_over(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Lists of equal modules that were taken for layers, and why."""
    for name, module in model.named_modules():
        counts = {_matrices(child) for child in module.children()}
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and len(module) > 1 and len(counts) == 1:
            (count,) = counts
            if count > _MOST_MATRICES:
                held = f"{name} holds {len(module)} modules of {count} matrices each, more than an expert has here"
                yield name, f"{held}: taken for layers and left alone (adapters on experts are to be merged first)"


def discover_ffn(model: nn.Module, taken: set[str]) -> Iterator[Candidate]:
    """Smallest modules with a matrix [F, D] and one [D, F] among the parameters that are not `taken` by experts."""
    modules = dict(model.named_modules())
    matrices = {
        name: {_join(name, n): p for n, p in module.named_parameters() if p.dim() == 2 and _join(name, n) not in taken}
        for name, module in modules.items()
    }
    holders = _smallest([name for name, found in matrices.items() if _has_pair(found.values())])
    # Square matrices pair with anything, attention's too: they count only where nothing else does.
    square = [
        name
        for name, found in matrices.items()
        if _all_square(found.values()) and not any(_within(name, h) or _within(h, name) for h in holders)
    ]
    chosen = {*holders, *_smallest(square)}
    for name in modules:
        if name in chosen:
            yield Candidate(name, "ffn", set(matrices[name]))


def _within(inner: str, outer: str) -> bool:
    return not outer or inner == outer or inner.startswith(outer + ".")


def _smallest(names: list[str]) -> list[str]:
    """Those that hold no other."""
    return [n for n in names if not any(other != n and _within(other, n) for other in names)]


def _has_pair(matrices: Iterable[torch.Tensor]) -> bool:
    shapes = {tuple(p.shape) for p in matrices}
    # Gate and up may be one matrix of twice the width.
    return any(
        a != b and ((b, a) in shapes or (a % 2 == 0 and b != a // 2 and (b, a // 2) in shapes)) for a, b in shapes
    )


def is_widening(matrices: Iterable[torch.Tensor]) -> bool:
    """A pair whose hidden width is above the model's: an FFN's. A narrower one is often attention's low-rank pair."""
    shapes = {tuple(p.shape) for p in matrices}
    return any(a > b and ((b, a) in shapes or (b, a // 2) in shapes) for a, b in shapes)


def _all_square(matrices: Iterable[torch.Tensor]) -> bool:
    shapes = [tuple(p.shape) for p in matrices]
    return len(shapes) in (2, 3) and len(set(shapes)) == 1 and shapes[0][0] == shapes[0][1]
