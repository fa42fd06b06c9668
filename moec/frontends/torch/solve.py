"""Solving y = sum_k w_k f_{e_k}(x) for x, e, w and y among the tensors of a block's log.

T tokens, K experts per token, E experts. Of all tensors that fit, the latest x, e and w before the experts and the
earliest complete y are taken, so that nothing the user's code does to them in between is lost.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from moec.frontends.torch.body import Body
from moec.frontends.torch.choices import Routing, Value, choices_of_experts, routing_of, routings
from moec.frontends.torch.direct import factors, near
from moec.frontends.torch.expertchoice import CHOSEN, never_repeats
from moec.frontends.torch.instances import NotLifted
from moec.frontends.torch.items import Blocks
from moec.frontends.torch.oplog import Log, slots
from moec.frontends.torch.places import Places
from moec.frontends.torch.replay import replay
from moec.frontends.torch.sides import chosen_on_input, is_scaled_through, on_input_by_sign

Hypotheses = Callable[[Sequence[Value], Value, int, int], Iterator[Routing]]


@dataclass(frozen=True)
class Solution:
    """Slots of x, selector, weights and y in the first log, and the entry after which y is complete.

    `routing` are all tensors that hold the selector or the weights, in whatever shape.
    """

    x: int
    selector: int | None
    weights: int | None
    form: str | None
    num_slots: int
    y: int
    complete: int
    on_input: bool
    routing: tuple[int, ...] = ()
    places: Places | None = None
    scale: float = 1.0
    """A number that every weight is multiplied by."""
    identities: int = 0
    """Experts behind the last that return their input: here the one of tokens that no expert took."""
    spread: bool = False
    """One choice holds for all tokens of a sequence."""


def _before(blocks: Blocks) -> list[Value]:
    """Tensors that exist where the experts are when the first of them starts, latest first, equal values once."""
    experts = blocks.log.tensors[blocks.log.entries[blocks.first].reads[0]].device
    made = [slot for item in blocks.prefix for slot in item.results]
    given = list(slots((blocks.site.args, blocks.site.kwargs)))
    found: list[Value] = []
    for slot in dict.fromkeys([*reversed(made), *given]):
        value = blocks.log.value(slot, blocks.first)
        if value is None or not value.numel() or blocks.log.param_of(slot) is not None:
            continue
        # Sizes and counts that the host works with lie on the CPU.
        if value.device != experts or _dispatched(blocks, slot):
            continue
        if not any(
            value.shape == c.value.shape and value.dtype == c.value.dtype and torch.equal(value, c.value) for c in found
        ):
            found.append(Value(slot, value))
    return found


def _dispatched(blocks: Blocks, slot: int) -> bool:
    """True for rows and routing already put in an order that the routing decides.

    On the probes such a tensor may equal the one in the tokens' order, and differ from it on other inputs.
    """
    log = blocks.log
    for index in log.closure([(slot, blocks.first)], start=blocks.site.start):
        entry = log.entries[index]
        if entry.name in ("nonzero", "masked_select", "_unique2", "unique_dim", "bincount"):
            return True
        if entry.name in ("sort", "argsort"):
            keys = log.tensors[entry.reads[0]]
            if keys.dim() == 1 or not keys.is_floating_point():
                return True
    return False


def _chosen_rows(blocks: Blocks, slot: int) -> bool:
    """True for floats that were picked by index: tokens are computed from the input, not picked from it."""
    log = blocks.log
    behind = log.closure([(slot, blocks.first)], start=blocks.site.start)
    return any(log.entries[i].name in ("index", "index_select", "gather", "topk", "sort", "argsort") for i in behind)


def _after(blocks: Blocks, body: Body, start: int) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(slot, entry, value) of floats as wide as an expert's output that appear or change from entry `start` on.

    The earliest comes first.
    """
    log = blocks.log
    for index in range(start, blocks.site.end):
        entry = log.entries[index]
        for slot in dict.fromkeys((*entry.results, *entry.writes)):
            tensor = log.tensors[slot]
            if tensor.is_floating_point() and tensor.dim() and tensor.shape[-1] == body.outputs:
                value = log.value(slot, index + 1)
                if value is not None:
                    yield slot, index, value


@dataclass
class Nearest:
    """The assignment of x, experts, weights and y that came closest, in words."""

    gap: float = float("inf")
    text: str = ""

    def offer(self, mine: torch.Tensor, theirs: torch.Tensor, say: Callable[[], str]) -> None:
        """Remember it where its relative error is the smallest so far."""
        gap = float((mine - theirs).norm() / torch.maximum(mine.norm(), theirs.norm()))
        if gap < self.gap and float(mine.norm()) > 0:
            row = int((mine - theirs).norm(dim=-1).argmax())
            place = int((mine - theirs)[row].abs().argmax())
            there, formula = float(theirs[row, place]), float(mine[row, place])
            values = f"y[{row}, {place}] is {there:.4g}, the formula gives {formula:.4g}"
            self.gap, self.text = gap, f"nearest: {say()}: error {gap:.1e}, {values}"


def solve_routed(
    blocks: Blocks,
    body: Body,
    params: Mapping[str, torch.Tensor],
    nearest: Nearest | None = None,
    *,
    hypotheses: Hypotheses = routings,
) -> Solution | None:
    """The solution for a mixture, None when no tensors of the log fit; `nearest` gets what came closest.

    `hypotheses` are the ways in which tensors may say who is routed where: by tokens, unless others are given.
    """
    candidates = _before(blocks)
    loose = 1e-4 if is_precise(params, body) else 4e-2
    ends = list(_after(blocks, body, blocks.last))
    scales = factors(blocks.log, blocks.first, blocks.site.end)
    wide = [c for c in candidates if c.value.is_floating_point() and c.value.dim() and c.value.shape[-1] == body.inputs]
    wide = [c for c in wide if not _chosen_rows(blocks, c.slot)]
    # Rows already repeated for their experts would do too, but the tokens themselves say more.
    for x in sorted(wide, key=lambda c: c.value.numel()):
        tokens = x.value.numel() // body.inputs
        rows = x.value.reshape(tokens, -1).float()
        fitting = [(s, i, v.reshape(tokens, -1).float()) for s, i, v in ends if v.numel() == tokens * body.outputs]
        if not fitting:
            continue
        outputs = _ExpertOutputs(body, params, rows)
        unclear = False
        for form, selector, weights, num_slots in hypotheses(candidates, x, tokens, body.experts):
            chosen = routing_of(form, selector, weights, rows, tokens, body.experts, num_slots)
            if chosen is None:
                continue
            # Weights that are one wherever they were probed may stand anywhere, or be applied elsewhere again.
            if (
                weights is not None
                and form in ("indices", *CHOSEN)
                and bool((weights.value == weights.value.flatten()[0]).all())
            ):
                unclear = unclear or bool((weights.value == 1).all())
                continue
            if form == "unit" and unclear:
                raise NotLifted("the routing weights were one for every token probed: where they act cannot be told")
            for on_input in (False, True) if not form.startswith("unit") else (False,):
                mine = outputs.combine(*chosen, on_input=on_input)
                for (slot, index, value), scale in itertools.product(fitting, [1.0] if on_input else scales):
                    found = (x.slot, _slot(selector), _slot(weights), form, num_slots, slot, index, on_input)
                    if near(mine * scale, value, loose):
                        same = _steering(blocks, selector, weights)
                        spread = form not in CHOSEN and selector is not None and _is_spread(blocks, selector)
                        if form in CHOSEN and selector is not None and not never_repeats(blocks.log, selector.slot):
                            raise NotLifted("an expert may choose a token twice: its choice is of no top-k or sort")
                        solution = Solution(*found, routing=same, scale=scale, spread=spread)
                        return _told_apart(blocks, body, params, solution, rows, chosen)
                    left = outputs.left_alone(*chosen) if form == "unit mask" else None
                    if left is not None and near(mine + left, value, loose):
                        same = _steering(blocks, selector, weights)
                        return Solution(*found, routing=same, identities=1)
                    if nearest is not None:
                        nearest.offer(mine, value, partial(_words, blocks.log, x, selector, weights, form, slot))
    return None


solve_chosen = partial(solve_routed, hypotheses=choices_of_experts)
"""The same where experts choose their tokens."""


def _words(log: Log, x: Value, selector: Value | None, weights: Value | None, form: str, y: int) -> str:
    """An assignment for people: each tensor by the operation that made it and its shape."""

    def named(slot: int) -> str:
        made = log.producer(slot)
        what = log.entries[made].name if made is not None else "input"
        return f"{what} {list(log.tensors[slot].shape)}"

    parts = [f"x = {named(x.slot)}"]
    parts += [f"experts = {named(selector.slot)}"] if selector is not None else []
    parts += [f"weights = {named(weights.slot)}"] if weights is not None else []
    return ", ".join([*parts, f"y = {named(y)}", f"routing as {form}"])


def _told_apart(
    blocks: Blocks,
    body: Body,
    params: Mapping[str, torch.Tensor],
    found: Solution,
    rows: torch.Tensor,
    chosen: tuple[torch.Tensor, torch.Tensor],
) -> Solution:
    """The solution, with the side that the weights act on asked for where the observed values do not tell it."""
    if found.weights is None or found.form == "dense" or not is_scaled_through(body, params, rows):
        return found
    log, slot = blocks.log, found.weights
    given = log.value(slot, blocks.first)
    assert given is not None
    again = log.closure([(found.y, found.complete + 1)], stop={slot: blocks.first}, start=blocks.site.start)
    again = {i for i in again if i <= found.complete}

    def ask(signs: torch.Tensor) -> torch.Tensor:
        return replay(log, again, {slot: given * signs.reshape(given.shape)}, found.y)

    if found.form in CHOSEN and found.selector is not None:
        ids = log.value(found.selector, blocks.first)
        return replace(found, on_input=chosen_on_input(body, params, rows, found.form, ids, given, ask))
    return replace(found, on_input=on_input_by_sign(body, params, rows, *chosen, ask))


def _slot(candidate: Value | None) -> int | None:
    return None if candidate is None else candidate.slot


def _steering(blocks: Blocks, selector: Value | None, weights: Value | None) -> tuple[int, ...]:
    """Tensors that hold the choice of experts in whatever shape, and the integers it was made from.

    Weights are no choice, unless they alone say which experts are asked.
    """
    log = blocks.log
    chosen = selector or weights
    assert chosen is not None
    behind = log.closure([(chosen.slot, blocks.first)], start=blocks.site.start)
    whole = [s for i in sorted(behind) for s in log.entries[i].results if not log.tensors[s].is_floating_point()]
    return (*_same_values(blocks, [chosen.value]), *whole)


def _same_values(blocks: Blocks, values: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Slots made before the experts that hold one of the values' elements in order."""
    found = []
    for slot in dict.fromkeys(slot for item in blocks.prefix for slot in item.results):
        held = blocks.log.value(slot, blocks.first)
        if held is not None and any(
            held.numel() == v.numel() and torch.equal(held.flatten().double(), v.flatten().double()) for v in values
        ):
            found.append(slot)
    return tuple(found)


def solve_dense(blocks: Blocks, body: Body, params: Mapping[str, torch.Tensor], source: int) -> Solution | None:
    """The solution for a plain FFN whose rows are the tensor `source`."""
    x = blocks.log.value(source, blocks.first)
    if x is None:
        return None
    rows = x.reshape(-1, body.inputs).float()
    mine = body.expert(params, 0, rows)
    loose = 1e-4 if is_precise(params, body) else 4e-2
    for slot, index, value in _after(blocks, body, blocks.last):
        if value.numel() == mine.numel() and near(mine, value.reshape(mine.shape).float(), loose):
            return Solution(source, None, None, None, 1, slot, index, False)
    return None


def is_precise(params: Mapping[str, torch.Tensor], body: Body) -> bool:
    return all(params[name].dtype in (torch.float32, torch.float64) for name in body.params)


class _ExpertOutputs:
    """f_e(x_t), computed once per expert and token asked for."""

    def __init__(self, body: Body, params: Mapping[str, torch.Tensor], rows: torch.Tensor) -> None:
        self.body, self.params, self.rows = body, params, rows
        self._known: dict[int, torch.Tensor] = {}

    def of(self, expert: int) -> torch.Tensor:
        if expert not in self._known:
            self._known[expert] = self.body.expert(self.params, expert, self.rows)
        return self._known[expert]

    def combine(self, experts: torch.Tensor, weights: torch.Tensor, *, on_input: bool) -> torch.Tensor:
        if on_input:
            return self.body.evaluate(self.params, self.rows, experts, weights, on_input=True)
        out = self.rows.new_zeros(self.rows.shape[0], self.body.outputs)
        for expert in torch.unique(experts).tolist():
            if 0 <= expert < self.body.experts:
                gate = torch.where(experts == expert, weights.float(), 0.0).sum(-1, keepdim=True)
                out += torch.where(gate != 0, gate * self.of(expert), 0.0)
        return out

    def left_alone(self, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor | None:
        """The tokens that no expert took, zeros for the others; None where there are none, or widths differ."""
        lost = experts == self.body.experts
        if self.body.inputs != self.body.outputs or not bool(lost.any()):
            return None
        return self.rows * torch.where(lost, weights.float(), 0.0).sum(-1, keepdim=True)


def _is_spread(blocks: Blocks, selector: Value) -> bool:
    held = blocks.log.value(selector.slot, blocks.first)
    return held is not None and held.numel() != selector.value.numel()
