"""What route, route_experts and group mean, one token and one expert at a time. T tokens, K choices, E experts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tests.backends.oracle_activations import sigmoid, softplus
from tests.backends.oracle_numbers import Matrix

Ids = Sequence[Sequence[int]]


def softmax(row: Sequence[float]) -> list[float]:
    """A row's softmax."""
    top = max(row)
    powers = [math.exp(z - top) for z in row]
    return [power / math.fsum(powers) for power in powers]


def group(ids: Ids, experts: int, kept: set[int] | None = None) -> tuple[list[int], list[int]]:
    """order and offsets: expert 0's slots ascending, then expert 1's; -1 for slots of no expert or not kept."""
    flat = [expert for row in ids for expert in row]
    order: list[int] = []
    offsets = [0]
    for expert in range(experts):
        order += [s for s, chosen in enumerate(flat) if chosen == expert and (kept is None or s in kept)]
        offsets.append(len(order))
    return order + [-1] * (len(flat) - len(order)), offsets


def kept_slots(
    ids: Ids,
    experts: int,
    capacity: int,
    *,
    weights: Sequence[Sequence[float]] | None = None,
    policy: str = "arrival",
    priority: str = "token",
    sequence: int | None = None,
) -> set[int]:
    """The slots that find a place: for each expert and scope the first `capacity` by priority, policy and arrival."""
    num_tokens, k = len(ids), len(ids[0]) if ids else 0

    def worth(slot: int) -> tuple[bool, float]:
        if policy == "arrival":
            return (False, 0.0)
        assert weights is not None
        row = weights[slot // k]
        largest_of_token = math.nan if any(math.isnan(w) for w in row) else max(row)
        number = row[slot % k] if policy == "weight" else largest_of_token
        return (math.isnan(number), 0.0 if math.isnan(number) else -number)

    def rank(slot: int) -> tuple[int, tuple[bool, float], int]:
        return (slot % k if priority == "choice" else 0, worth(slot), slot)

    found: set[int] = set()
    length = sequence or max(num_tokens, 1)
    for start in range(0, num_tokens, length):
        tokens = range(start, min(start + length, num_tokens))
        for expert in range(experts):
            wanting = [t * k + j for t in tokens for j in range(k) if ids[t][j] == expert]
            found.update(sorted(wanting, key=rank)[:capacity])
    return found


def score(row: Sequence[float], kind: str) -> list[float]:
    """One token's scores."""
    if kind == "softmax":
        return softmax(row)
    if kind == "sigmoid":
        return [sigmoid(z) for z in row]
    if kind == "sqrt_softplus":
        return [math.sqrt(softplus(z)) for z in row]
    assert kind in ("identity", "softmax_chosen")
    return list(row)


def largest(row: Sequence[float], count: int) -> list[int]:
    """Where the largest numbers are, largest first, among equals the lower place first."""
    return sorted(range(len(row)), key=lambda place: (-row[place], place))[:count]


def keep_groups(row: list[float], groups: int, kept: int, group_score: str, fill: str) -> list[float]:
    """A row with all but the best groups replaced."""
    size = len(row) // groups
    parts = [row[g * size : (g + 1) * size] for g in range(groups)]
    worth = [max(part) if group_score == "max" else math.fsum(sorted(part)[-2:]) for part in parts]
    best = largest(worth, kept)
    rest = -math.inf if fill == "minus_inf" else 0.0
    return [number if g in best else rest for g, part in enumerate(parts) for number in part]


def normalized(weights: list[float], kind: str, eps: float, p: float) -> list[float]:
    """Weights of one token after step 6 of `route`."""
    if kind == "none":
        return weights
    total = math.fsum(weights)
    if kind == "sum":
        below = total + eps
    elif kind == "clamped_sum":
        below = max(total, eps)
    else:
        below = math.fsum(abs(w) ** p for w in weights) ** (1 / p)
    return [w / below for w in weights]


def route_token(logits: Sequence[float], bias: Sequence[float] | None, **at: object) -> tuple[list[float], list[int]]:
    """One token's weights and experts; `at` holds the op's attributes."""
    get = {"score": "softmax", "bias_on": "scores", "groups": 1, "kept_groups": 1, "group_score": "max"}
    get |= {"group_fill": "minus_inf", "normalize": "none", "eps": 0.0, "p": 1.0, "scale": 1.0} | at
    z = list(logits)
    if bias is not None and get["bias_on"] == "logits":
        z = [a + b for a, b in zip(z, bias, strict=True)]
    s = score(z, str(get["score"]))
    c = s if bias is None or get["bias_on"] == "logits" else [a + b for a, b in zip(s, bias, strict=True)]
    groups = int(str(get["groups"]))
    if groups > 1:
        c = keep_groups(c, groups, int(str(get["kept_groups"])), str(get["group_score"]), str(get["group_fill"]))
    experts = largest(c, int(str(get["k"])))
    weights = [s[e] for e in experts]
    if get["score"] == "softmax_chosen":
        weights = softmax(weights)
    weights = normalized(weights, str(get["normalize"]), float(str(get["eps"])), float(str(get["p"])))
    return [w * float(str(get["scale"])) for w in weights], experts


def route_experts(logits: Matrix, capacity: int, kind: str) -> tuple[Matrix, list[list[int]]]:
    """Each expert's weights and tokens."""
    if kind == "softmax_tokens":
        columns = [softmax(list(column)) for column in zip(*logits, strict=True)]
    else:
        columns = [list(column) for column in zip(*[score(row, kind) for row in logits], strict=True)]
    weights, tokens = [], []
    for column in columns:
        best = largest(column, capacity)
        missing = capacity - len(best)
        tokens.append(best + [-1] * missing)
        weights.append([column[t] for t in best] + [0.0] * missing)
    return weights, tokens
