"""What the ops on rows mean, one element at a time. T tokens, K choices, E experts, R rows, N outputs, C inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tests.backends.oracle_activations import activated
from tests.backends.oracle_numbers import Matrix, Sum
from tests.backends.oracle_routing import group

Ints = Sequence[int]
Bank = Sequence[Matrix]


def product(row: Sequence[float], w: Matrix, b: Sequence[float] | None = None) -> list[Sum]:
    """row[C] @ w[N, C].T + b[N]."""
    bias = [0.0] * len(w) if b is None else b
    return [
        Sum.of([*(x * y for x, y in zip(row, out, strict=True)), extra]) for out, extra in zip(w, bias, strict=True)
    ]


def grouped(rows: Matrix, offsets: Ints, w: Bank, b: Matrix | None = None) -> list[list[Sum]]:
    """Each row through its expert's matrix; rows of no expert are zeros."""
    found = [[Sum(0.0, 0.0, 0)] * len(w[0]) for _ in rows]
    for e, matrix in enumerate(w):
        for r in range(offsets[e], offsets[e + 1]):
            found[r] = product(rows[r], matrix, None if b is None else b[e])
    return found


def gather(x: Matrix, order: Ints, k: int, width: int) -> Matrix:
    """A row for each entry of order."""
    return [x[slot // k] if slot >= 0 else [0.0] * width for slot in order]


def combine(rows: Matrix, order: Ints, weights: Matrix, width: int) -> list[list[Sum]]:
    """Each token's weighted rows."""
    found = []
    for t, row in enumerate(weights):
        places = [(order.index(t * len(row) + j), w) for j, w in enumerate(row) if t * len(row) + j in order]
        found.append([Sum.of([w * rows[r][d] for r, w in places]) for d in range(width)])
    return found


def combine_chosen(rows: Matrix, order: Ints, weights: Sequence[float], tokens: int, width: int) -> list[list[Sum]]:
    """Each token's weighted rows where order holds tokens and weights belong to rows."""
    mine = [[r for r, token in enumerate(order) if token == t] for t in range(tokens)]
    return [[Sum.of([weights[r] * rows[r][d] for r in held]) for d in range(width)] for held in mine]


def quantized(row: Sequence[float]) -> tuple[list[int], float]:
    """One output of a weight, or one part of a row, as int8 and its scale."""
    largest = max(abs(x) for x in row)
    scale = largest / 127 if largest else 1.0
    return [round(x / scale) for x in row], scale


def norm(
    row: Sequence[float], w: Sequence[float] | None, b: Sequence[float] | None, kind: str, eps: float, shift: float
) -> list[float]:
    """One row normalised, or with kind="none" as it is, then scaled and shifted."""
    mean = math.fsum(row) / len(row) if kind == "layer" else 0.0
    centred = [x - mean for x in row]
    spread = math.sqrt(math.fsum(x * x for x in centred) / len(row) + eps)
    y = centred if kind == "none" else [x / spread for x in centred]
    if w is not None:
        y = [x * (factor + shift) for x, factor in zip(y, w, strict=True)]
    return y if b is None else [x + extra for x, extra in zip(y, b, strict=True)]


def ffn(
    row: Sequence[float],
    at: Mapping[str, object],
    w_in: Matrix,
    w_out: Matrix,
    *,
    b_in: Sequence[float] | None = None,
    b_out: Sequence[float] | None = None,
    w_up: Matrix | None = None,
    b_up: Sequence[float] | None = None,
) -> list[float]:
    """One row through one expert."""
    gate = [s.value for s in product(row, w_in, b_in)]
    up = None if w_up is None else [s.value for s in product(row, w_up, b_up)]
    return [s.value for s in product(activated(gate, up, at), w_out, b_out)]


def expert_ffn(
    x: Matrix,
    ids: Sequence[Sequence[int]],
    weights: Matrix,
    at: Mapping[str, object],
    banks: Mapping[str, Sequence[Matrix] | Matrix | None],
    width: int,
) -> Matrix:
    """A whole layer, token by token: the weighted sum over its choices that name an expert."""
    w_in = banks["w_in"]
    assert w_in is not None
    found = []
    for row, chosen, factors in zip(x, ids, weights, strict=True):
        total = [0.0] * width
        for e, factor in zip(chosen, factors, strict=True):
            if 0 <= e < len(w_in):
                one = {name: None if bank is None else bank[e] for name, bank in banks.items()}
                y = ffn(row, at, one.pop("w_in"), one.pop("w_out"), **one)  # type: ignore[arg-type]
                total = [a + factor * b for a, b in zip(total, y, strict=True)]
        found.append(total)
    return found


def places(ids: Sequence[Sequence[int]], experts: int) -> tuple[list[int], list[int]]:
    """order and offsets without capacity."""
    return group(ids, experts)
