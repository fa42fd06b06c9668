"""Masks over hidden rows: what is proved to keep every expert's rows, and what could clear one for another reason.

R rows, D width, F hidden width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moec.frontends.torch.instances import Instance, NotLifted, check_masks, find_instances
from moec.frontends.torch.linears import LinearFinder
from moec.frontends.torch.oplog import Log
from moec.frontends.torch.recorder import record
from moec.frontends.torch.rowmasks import idle_masks
from tests.frontend_units.build import Do, given, params_of, rand

R, D, WIDE, E = 7, 4, 6, 5
IDS = torch.tensor([4, 0, 2, 2, 1, 3, 0])
Clear = Callable[[Tensor, Tensor], Tensor]


def find(clear: Clear, ids: Tensor = IDS) -> tuple[Log, Instance]:
    """An expert u [F, D], d [D, F] whose hidden rows go through `clear(hidden, ids)`."""

    def does(m: Any, x: Tensor, ids: Tensor) -> Tensor:
        return F.linear(F.relu(clear(F.linear(x, m.u), ids)), m.d)

    module = Do(does, u=rand(WIDE, D), d=rand(D, WIDE, seed=1))
    log = record(module, (rand(R, D, seed=2), ids), {})
    products = LinearFinder(log, params_of(module), lambda name: name in "ud").find(0, len(log.entries))
    (instance,) = find_instances(log, products)
    return log, instance


def prove(log: Log, instance: Instance) -> None:
    ids = log.storages[given(log, 1)]
    check_masks(log, instance.masks, lambda slot: log.storages[slot] == ids, E)


def other_order(h: Tensor, ids: Tensor) -> Tensor:
    order = ids.argsort()
    return h.masked_fill((ids[order] == E)[:, None], 0.0)


def shifted(h: Tensor, ids: Tensor) -> Tensor:
    return h.masked_fill(((ids - 1 < -1) | (ids + 1 > E))[:, None].expand_as(h), 0.0)


PROVED: dict[str, Clear] = {
    "filled": lambda h, ids: h.masked_fill((ids >= E)[:, None], 0.0),
    "in place": lambda h, ids: h.masked_fill_((ids >= E)[:, None], 0),
    "a tensor fills": lambda h, ids: h.masked_fill((ids >= E)[:, None], torch.tensor(0.0)),
    "sorted": lambda h, ids: h.masked_fill((ids.sort().values >= E)[:, None], 0.0),
    "other order": other_order,
    "shifted": shifted,
    "where": lambda h, ids: torch.where((ids < E)[:, None], h, 0.0),
    "where not": lambda h, ids: torch.where((ids >= E)[:, None], torch.zeros_like(h), h),
    "multiplied": lambda h, ids: h * (ids < E).unsqueeze(-1).to(h.dtype),
    "multiplied in place": lambda h, ids: h.mul_((~(ids >= E)).float()[:, None]),
    "from one": lambda h, ids: (1 - (ids == E).float())[:, None] * h,
}


@pytest.mark.parametrize("clear", PROVED.values(), ids=PROVED)
def test_ids_behind_the_experts_are_cleared(clear: Clear) -> None:
    log, instance = find(clear)
    assert len(instance.masks) == 1
    assert not {"sort", "ge", "lt", "unsqueeze"} & {log.entries[i].name for i in instance.middle}
    prove(log, instance)


@pytest.mark.parametrize("clear", PROVED.values(), ids=PROVED)
def test_one_expert_fewer_is_not_proved(clear: Clear) -> None:
    """The same code where there is an expert more: its rows would be lost."""
    log, instance = find(clear)
    ids = log.storages[given(log, 1)]
    with pytest.raises(NotLifted, match=f"the rows of expert {E} are masked"):
        check_masks(log, instance.masks, lambda slot: log.storages[slot] == ids, E + 1)


def two_ids(h: Tensor, ids: Tensor) -> Tensor:
    """True whichever id all of them have; of two that differ it may be false."""
    return h.masked_fill(~((ids < 2) | (ids[torch.arange(R).flip(0)] >= 2))[:, None], 0.0)


NOT_PROVED: dict[str, tuple[Clear, str]] = {
    "one expert": (lambda h, ids: h.masked_fill((ids == 3)[:, None], 0.0), "rows of expert 3 are masked"),
    "the first": (lambda h, ids: h.masked_fill((ids < 1)[:, None], 0.0), "rows of expert 0 are masked"),
    "a place": (lambda h, ids: h.masked_fill((torch.arange(R) > 90)[:, None], 0.0), "arange"),
    "both": (lambda h, ids: h.masked_fill(((ids >= E) | (torch.arange(R) > 90))[:, None], 0.0), "arange"),
    "a count": (lambda h, ids: h.masked_fill((ids.cumsum(0) > 9000)[:, None], 0.0), "cumsum"),
    "how many": (lambda h, ids: h.masked_fill((ids.bincount()[ids] > 90)[:, None], 0.0), "bincount"),
    "an order": (lambda h, ids: h.masked_fill((ids.sort().indices > 90)[:, None], 0.0), "sort"),
    "two ids": (two_ids, "no plain choice"),
    "a half": (lambda h, ids: h * (1 - (ids == E).float() * 0.5)[:, None], "no plain choice"),
    "twice": (lambda h, ids: h * (1 + (ids >= E).float())[:, None], "no plain choice"),
}


@pytest.mark.parametrize("name", NOT_PROVED)
def test_other_reasons_to_clear_a_row_are_refused(name: str) -> None:
    clear, reason = NOT_PROVED[name]
    with pytest.raises(NotLifted, match=reason):
        prove(*find(clear))


@pytest.mark.parametrize(
    ("clear", "reason"),
    [
        (lambda h, ids: h.masked_fill((ids >= E)[:, None], 7.0), "are set to 7"),
        (lambda h, ids: torch.where((ids < E)[:, None], h, -1.0), "are set to -1"),
        (lambda h, ids: h.masked_fill((torch.ones(R, 1) > 2), 0.0), "result of ones"),
    ],
)
def test_what_is_no_mask_by_ids_is_refused_at_once(clear: Clear, reason: str) -> None:
    with pytest.raises(NotLifted, match=reason):
        find(clear)


def test_ids_written_to_before_the_comparison_are_not_followed() -> None:
    def clear(h: Tensor, ids: Tensor) -> Tensor:
        mine = ids.clone()
        mine[R - 1] = E
        return h.masked_fill((mine >= E)[:, None], 0.0)

    with pytest.raises(NotLifted, match="written to"):
        prove(*find(clear))


def test_ids_of_another_tensor_prove_nothing() -> None:
    log, instance = find(PROVED["filled"])
    with pytest.raises(NotLifted, match="more than their expert ids"):
        check_masks(log, instance.masks, lambda slot: False, E)


def test_an_activation_that_looks_like_a_mask_is_none() -> None:
    _, instance = find(lambda h, ids: h.masked_fill(h < 0, 0.0))
    assert instance.masks == ()
    _, instance = find(lambda h, ids: torch.where(h.amax(-1, keepdim=True) > 0, h, 0.0))
    assert instance.masks == ()


def test_rows_that_the_probe_did_clear_do_not_matter() -> None:
    """With the sentinel among the ids the mask is read as without."""
    log, instance = find(PROVED["filled"], torch.tensor([E, 0, E, 2, 1, E, 0]))
    assert len(instance.masks) == 1
    prove(log, instance)


IDLE: dict[str, Clear] = {
    "filled": lambda h, ids: h.masked_fill((torch.arange(R) > 90)[:, None], 0.0),
    "where": lambda h, ids: torch.where((torch.arange(R) < 90)[:, None], h, torch.ones_like(h)),
    "multiplied": lambda h, ids: h * (torch.arange(R) < 90)[:, None],
    "a cast": lambda h, ids: h * (torch.arange(R) < 90).float().view(R, 1),
}


@pytest.mark.parametrize("after", IDLE.values(), ids=IDLE)
def test_masks_that_did_nothing_are_seen_around_the_layers(after: Clear) -> None:
    module = Do(lambda m, x, ids: after(F.linear(x, m.u), ids), u=rand(WIDE, D))
    log = record(module, (rand(R, D), IDS), {})
    (mask,) = idle_masks(log, range(len(log.entries)))
    with pytest.raises(NotLifted, match="arange"):
        check_masks(log, [], lambda slot: False, E, [mask])


def test_a_choice_of_experts_behind_a_layer_is_no_other_reason() -> None:
    """All ids were 2 while observed; what the mask does to others, probes that choose them show."""
    module = Do(lambda m, x, ids: F.linear(x, m.u) * (ids == 2)[:, None], u=rand(WIDE, D))
    log = record(module, (rand(R, D), torch.full((R,), 2)), {})
    (mask,) = idle_masks(log, range(len(log.entries)))
    ids = log.storages[given(log, 1)]
    check_masks(log, [], lambda slot: log.storages[slot] == ids, E, [mask])
    with pytest.raises(NotLifted, match="more than their expert ids"):
        check_masks(log, [], lambda slot: False, E, [mask])


@pytest.mark.parametrize(
    "after",
    [
        lambda h, ids: h.masked_fill((ids == 2)[:, None], 0.0),
        lambda h, ids: torch.where(h > 0, h, 0.0),
        lambda h, ids: h * torch.ones(R, 1),
    ],
)
def test_what_shows_in_values_is_left_to_the_probes(after: Clear) -> None:
    module = Do(lambda m, x, ids: after(F.linear(x, m.u), ids), u=rand(WIDE, D))
    log = record(module, (rand(R, D), IDS), {})
    assert list(idle_masks(log, range(len(log.entries)))) == []
