"""Naming the activation between an expert's layers, by values on separating inputs.

The recorded entries between the layers are run again on synthetic hidden values of mixed scales (0.05 to 60), in fp32
where they allow it: at unit scale a clamp at 7 vanishes and gelu passes for gelu_tanh. A name is given only when every
value agrees.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from moec.frontends.torch.oplog import Log
from moec.trees import tree_flatten

Ask = Callable[[list[torch.Tensor]], torch.Tensor]
_SCALES = (0.05, 0.2, 1.0, 8.0, 30.0, 60.0)

FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
}


@dataclass(frozen=True)
class Activation:
    """Attributes of the IR's `act` (one input) or `glu` (two, or one with a layout)."""

    fn: str
    layout: str | None = None
    alpha: float | None = None
    limit: float | None = None
    clamp_after: bool = False
    up_shift: float = 0.0

    def __str__(self) -> str:
        parts = [self.fn if self.alpha is None else f"{self.fn}(alpha={self.alpha:g})"]
        parts += [f"gated, {self.layout.replace('_', ' ')}"] if self.layout is not None else []
        parts += (
            [f"clamped at {self.limit:g}{' afterwards' if self.clamp_after else ''}"] if self.limit is not None else []
        )
        return ", ".join([*parts, *([f"up + {self.up_shift:g}"] if self.up_shift else [])])

    @property
    def gated(self) -> bool:
        return self.layout is not None

    def __call__(self, hidden: Sequence[torch.Tensor]) -> torch.Tensor:
        gate, factor = self.parts(hidden)
        return gate if factor is None else gate * factor

    def parts(self, hidden: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The activated gate, and what it is multiplied with (None without a gate)."""
        if self.layout is None:
            return self._gate(hidden[0]), None
        gate, up = _halves(hidden, self.layout)
        if self.limit is not None:
            up = up.clamp(-self.limit, self.limit)
        return self._gate(gate), up + self.up_shift

    def _gate(self, x: torch.Tensor) -> torch.Tensor:
        if self.limit is not None and not self.clamp_after:
            x = x.clamp(max=self.limit)
        x = x * torch.sigmoid(self.alpha * x) if self.alpha is not None else FUNCTIONS[self.fn](x)
        return x.clamp(max=self.limit) if self.limit is not None and self.clamp_after else x


def _halves(hidden: Sequence[torch.Tensor], layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    if layout == "pair":
        return hidden[0], hidden[1]
    if layout == "pair_up_first":
        return hidden[1], hidden[0]
    h = hidden[0]
    first, second = h.chunk(2, dim=-1) if layout.startswith("concat") else (h[..., ::2], h[..., 1::2])
    return (second, first) if layout.endswith("up_first") else (first, second)


def constants(log: Log, entries: Sequence[int]) -> list[float]:
    """Numbers that appear as arguments of the entries: candidates for a clamp, a slope or a shift."""
    found: set[float] = set()
    for index in entries:
        entry = log.entries[index]
        leaves = tree_flatten((entry.args, entry.kwargs))[0]
        found |= {abs(float(v)) for v in leaves if isinstance(v, (int, float)) and not isinstance(v, bool)}
        for slot in entry.reads:
            tensor = log.tensors[slot]
            if (
                tensor.numel() == 1
                and log.param_of(slot) is None
                and log.producer(slot) is None
                and tensor.is_floating_point()
            ):
                found.add(abs(tensor.detach().item()))
    return sorted(found)


def _candidates(layouts: Sequence[str | None], numbers: Sequence[float]) -> Iterator[Activation]:
    for layout, fn in itertools.product(layouts, FUNCTIONS):
        yield Activation(fn, layout)
    limits = [None, *(n for n in numbers if n > 0)]
    for layout, limit, after in itertools.product(layouts, limits, (False, True)):
        for shift in [0.0, *(n for n in numbers if n > 0)] if layout is not None else [0.0]:
            for fn in FUNCTIONS:
                yield Activation(fn, layout, None, limit, after, shift)
            for alpha in (n for n in numbers if n > 0 and n != 1):
                yield Activation("silu", layout, alpha, limit, after, shift)


def synthetic(widths: Sequence[int], seed: int) -> list[torch.Tensor]:
    """Random hidden vectors whose elements have mixed scales."""
    generator = torch.Generator().manual_seed(seed)
    pick = torch.tensor(_SCALES)
    return [
        torch.randn(n, generator=generator) * pick[torch.randint(len(_SCALES), (n,), generator=generator)]
        for n in widths
    ]


def _layouts(widths: Sequence[int], width: int) -> list[str | None]:
    """How gate and up may lie in first layers of these widths before hidden values of `width`."""
    if len(widths) == 2:
        return ["pair", "pair_up_first"]
    if widths[0] == 2 * width:
        return ["concat", "concat_up_first", "interleaved", "interleaved_up_first"]
    return [None] if widths[0] == width else []


def name_activation(
    ask: Ask, widths: Sequence[int], width: int, numbers: Sequence[float], tolerance: float
) -> Activation | None:
    """The activation that `ask` computes on hidden vectors of the given widths, or None.

    `ask` maps one vector per up-projection ([N] each) to the hidden vector [F] the down-projection reads. `tolerance`
    is relative, per element.
    """
    layouts = _layouts(widths, width)
    if not layouts:
        return None
    rounds = max(4, min(64, 600 // max(1, sum(widths))))
    questions = [synthetic(widths, seed) for seed in range(rounds)]
    # A bound far out shows only beyond it.
    questions += [[v * 4 * n for v in synthetic(widths, 7)] for n in numbers if max(_SCALES) < n < 1e6]
    questions.append([torch.zeros(n) for n in widths])
    answers = [ask([v.clone() for v in q]).cpu() for q in questions]
    tried: set[Activation] = set()
    for candidate in _candidates(layouts, numbers):
        if candidate in tried:
            continue
        tried.add(candidate)
        if all(_same(candidate.parts(q), a, tolerance) for q, a in zip(questions, answers, strict=True)):
            return candidate
    return None


def _same(parts: tuple[torch.Tensor, torch.Tensor | None], theirs: torch.Tensor, tolerance: float) -> bool:
    gate, factor = parts
    if gate.shape != theirs.shape:
        return False
    mine, theirs = gate if factor is None else gate * factor, theirs.float()
    # The floor is for gates that cancel to almost nothing (gelu far below zero); the other half magnifies what is left.
    floor = 1e-1 * (1.0 if factor is None else factor.abs().clamp(min=1.0))
    return bool(((mine - theirs).abs() <= tolerance * (theirs.abs() + floor)).all())


def nearest_name(ask: Ask, widths: Sequence[int], width: int, numbers: Sequence[float]) -> str:
    """The activation that comes closest to what `ask` computes, with the values that show that it is not it."""
    layouts = _layouts(widths, width)
    question = synthetic(widths, 1)
    answer = ask([v.clone() for v in question]).cpu().float()
    best, said = float("inf"), ""
    for candidate in dict.fromkeys(_candidates(layouts, numbers)):
        mine = candidate(question)
        gap = float((mine - answer).norm() / answer.norm()) if mine.shape == answer.shape else float("inf")
        if gap < best:
            at = int((mine - answer).abs().argmax())
            layout = candidate.layout
            inputs = [question[0]] if layout is None else _halves(question, layout)
            of = " and ".join(f"{float(v[at]):.4g}" for v in inputs)
            theirs, best = float(answer[at]), gap
            said = f"nearest: {candidate}, which makes {float(mine[at]):.4g} of {of}, the code {theirs:.4g}"
    return said
