"""Weights of experts among the initializers of a region: stacked [E, ...], or one for each expert.

E experts, N outputs, C inputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Any

from moec.frontends.onnx.constants import Constants
from moec.frontends.onnx.store import Bank

CLAMPS = ("Clip", "Min", "Max")


@dataclass(frozen=True)
class Found:
    """The initializers of a region that may be weights of experts."""

    matrices: tuple[Bank, ...]
    """[E, a, b] each, in order of use."""
    biases: tuple[Bank, ...]
    """[E, a] each."""
    scalars: tuple[float, ...]
    limits: tuple[float, ...]
    """Those of them that something is clamped at."""


def expert_weights(nodes: Sequence[Any], read: Constants, experts: int) -> Found:
    """The constants of `nodes` that can be told apart by expert. `experts` is the least number there may be."""
    values = [value for value in read.of(nodes) if read.is_float(value)]
    three = [v for v in values if len(read.shape(v)) == 3 and read.shape(v)[0] >= experts]
    scalars = _scalars(values, read)
    limits = limits_of(nodes, read)
    if three:
        count = read.shape(three[0])[0]
        two = [v for v in values if len(read.shape(v)) in (2, 3) and read.shape(v)[0] == count and _is_bias(read, v)]
        same = [v for v in three if read.shape(v)[0] == count and v not in two]
        biases = tuple(read.tensor(v).reshape(count, -1) for v in two)
        return Found(tuple(map(read.tensor, same)), biases, scalars, limits)
    return Found(_lists(values, read, 2, experts), _lists(values, read, 1, experts), scalars, limits)


def limits_of(nodes: Iterable[Any], read: Constants) -> tuple[float, ...]:
    """The numbers that nodes clamp at."""
    return _scalars([value for value in read.of(n for n in nodes if n.op_type in CLAMPS) if read.is_float(value)], read)


def _scalars(values: Sequence[Any], read: Constants) -> tuple[float, ...]:
    return tuple(float(read.tensor(v)) for v in values if read.shape(v) in ((), (1,)))


def _is_bias(read: Constants, value: Any) -> bool:
    """[E, N], or [E, 1, N] to be added to [E, C, N]."""
    shape = read.shape(value)
    return len(shape) == 2 or shape[1] == 1


def _lists(values: Sequence[Any], read: Constants, rank: int, experts: int) -> tuple[Bank, ...]:
    """Constants that are alike but for a number in their name, as one list for each name."""
    groups: dict[tuple[str, tuple[int, ...]], list[tuple[list[int], Any]]] = {}
    for value in values:
        if len(read.shape(value)) == rank:
            name = _origin(value)
            numbers = [int(one) for one in re.findall(r"\d+", name)]
            groups.setdefault((re.sub(r"\d+", "#", name), read.shape(value)), []).append((numbers, value))
    found = []
    for members in groups.values():
        ordered = [value for _, value in sorted(members, key=lambda member: member[0])]
        if len(ordered) >= max(2, experts):
            found.append(tuple(map(read.tensor, ordered)))
    return tuple(found)


def _origin(value: Any) -> str:
    """The name of the initializer that a constant is computed from."""
    while value.const_value is None and value.producer() is not None and value.producer().inputs:
        value = value.producer().inputs[0]
    return str(value.name)


@dataclass(frozen=True)
class Body:
    """Which weights are which: w_in[E, N, C], w_up?, w_out[E, O, F] and their biases."""

    w_in: Bank
    w_out: Bank
    w_up: Bank | None = None
    b_in: Bank | None = None
    b_out: Bank | None = None
    b_up: Bank | None = None


def bodies(found: Found, width: int) -> Iterator[Body]:
    """Every way to read the weights as an expert that takes `width` inputs, in the order of use first."""
    count = len(found.matrices)
    if count not in (2, 3):
        return
    for order in permutations(range(count)):
        chosen = [found.matrices[i] for i in order]
        for turns in range(2**count):
            turned = [_turned(bank) if turns >> i & 1 else bank for i, bank in enumerate(chosen)]
            yield from _bodies(turned, found.biases, width)


def _turned(bank: Bank) -> Bank:
    return tuple(one.T for one in bank) if isinstance(bank, tuple) else bank.transpose(1, 2)


def shape_of(bank: Bank) -> tuple[int, ...]:
    """The shape of one expert's part."""
    return tuple(bank[0].shape)


def _bodies(matrices: Sequence[Bank], biases: Sequence[Bank], width: int) -> Iterator[Body]:
    """These matrices with every way to give them the biases, those of the products in front in order of use."""
    first, last = matrices[0], matrices[-1]
    up = matrices[1] if len(matrices) == 3 else None
    (rows, inputs), (outputs, hidden) = shape_of(first), shape_of(last)
    if inputs != width or outputs != width or (up is not None and shape_of(up) != shape_of(first)):
        return
    if hidden not in ((rows,) if up is not None else (rows, rows // 2)):
        return
    for count in range(min(len(biases), 1 if up is None else 2) + 1):
        for ins in combinations(range(len(biases)), count):
            outs = [bank for i, bank in enumerate(biases) if i not in ins]
            fits = all(shape_of(biases[i]) == (rows,) for i in ins) and all(shape_of(b) == (outputs,) for b in outs)
            if fits and len(outs) < 2:
                b_in, b_up = [*(biases[i] for i in ins), None, None][:2]
                yield Body(first, last, up, b_in, outs[0] if outs else None, b_up)
