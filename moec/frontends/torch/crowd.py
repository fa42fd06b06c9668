"""Runs of a block whose router is told what to say: its logits are replaced, everything after them is the user's code.

So a router's choices are known, and can be made as crowded as it takes to see which tokens an expert turns away.
B sequences, S positions, T = B * S tokens, E experts, D inputs and O outputs of an expert.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moec.frontends.torch.body import Body
from moec.frontends.torch.instances import NotLifted
from moec.frontends.torch.observe import Driver, users_code
from moec.frontends.torch.observe import tokens as random_tokens
from moec.frontends.torch.oplog import Log
from moec.frontends.torch.recorder import record

# Tensors that a run is looked through for tokens and results.
_MOST, _MOST_GIVEN = 400, 4


class Unseen(NotLifted):
    """Whether tokens are dropped cannot be seen."""


class _Said(TorchDispatchMode):
    """Gives `logits` for every result of their size that is computed from the router's weight."""

    def __init__(self, weight: torch.Tensor, logits: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storage, self.logits, self.times = weight.untyped_storage()._cdata, logits, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not isinstance(out, torch.Tensor) or not out.is_floating_point() or out.numel() != self.logits.numel():
            return out
        given = [a for a in args if isinstance(a, torch.Tensor)]
        if out.shape[-1:] != self.logits.shape[-1:] or out.untyped_storage()._cdata == self.storage:
            return out
        if all(a.untyped_storage()._cdata != self.storage for a in given):
            return out
        self.times += 1
        return self.logits.to(out.dtype).reshape(out.shape).clone()


def routers(log: Log, body: Body, tokens: int) -> list[str]:
    """Parameters from which a number for each token and expert is computed, in the order in which they are used."""
    found: dict[str, None] = {}
    for entry in log.entries:
        for slot in entry.results:
            out = log.tensors[slot]
            if out.is_floating_point() and out.numel() == tokens * body.experts and out.shape[-1] == body.experts:
                names = [log.param_of(read) for read in entry.reads]
                if log.param_of(slot) is None:
                    found.update((n, None) for n in names if n is not None and n not in body.params)
    return list(found)


@dataclass(frozen=True)
class Ran:
    """One run: what experts could have taken [T, D], in the order computed, and what could be their sum [T, O]."""

    log: Log
    tokens: int
    body: Body

    def wide(self, width: int) -> Iterator[torch.Tensor]:
        """Floats [T, width] that appear or change, each value once, on the CPU."""
        known: list[torch.Tensor] = []
        log = self.log
        for entry in log.entries:
            for slot in dict.fromkeys((*entry.reads, *entry.results, *entry.writes)):
                tensor = log.tensors[slot]
                if not tensor.is_floating_point() or tensor.dim() < 2 or tensor.shape[-1] != width:
                    continue
                if tensor.numel() != self.tokens * width or log.param_of(slot) is not None:
                    continue
                value = log.value(slot, entry.index + 1)
                if value is None or len(known) >= _MOST:
                    continue
                rows = value.reshape(self.tokens, width).float().cpu()
                if not any(rows is one or torch.equal(rows, one) for one in known):
                    known.append(rows)
                    yield rows

    def given(self) -> Iterator[torch.Tensor]:
        """The first few that could be the tokens [T, D]: of zeros, any expert without biases makes zeros."""
        every = (rows for rows in self.wide(self.body.inputs) if bool((rows.norm(dim=1) > 0).all()))
        return itertools.islice(every, _MOST_GIVEN)


@dataclass
class Crowd:
    """A block to run, and the weight that its router's logits are computed from."""

    driver: Driver
    body: Body
    params: Mapping[str, torch.Tensor]
    router: str
    runs: int = field(default=0)

    @property
    def by_sequence(self) -> bool:
        """Whether the block takes [B, S, D]."""
        return self.driver.main is not None and self.driver.main.dim() == 3

    def run(self, logits: torch.Tensor) -> Ran:
        """The block on other tokens, its logits [B, S, E] given. Raises Unseen where they are computed twice."""
        main = self.driver.main
        assert main is not None
        self.runs += 1
        batch, length, _ = logits.shape
        shape = (batch, length, main.shape[-1]) if self.by_sequence else (batch * length, main.shape[-1])
        x = random_tokens(shape, main.dtype, 40 + self.runs, device=main.device, mixed=False)
        driver = self.driver.with_input(x)
        said = _Said(self.params[self.router], logits.to(main.device))
        with users_code(driver.path), said:
            log = record(driver.module, driver.args, driver.kwargs, path=driver.path)
        if said.times != 1:
            raise Unseen(f"the router's logits are computed {said.times} times")
        return Ran(log, batch * length, self.body)

    def results(self, rows: torch.Tensor) -> torch.Tensor:
        """f_e(x_t) of every expert: [T, O, E], on the CPU as all that is compared here."""
        main = self.driver.main
        assert main is not None
        given = rows.to(main.device)
        return torch.stack([self.body.expert(self.params, e, given).cpu() for e in range(self.body.experts)], -1)


def gates(results: torch.Tensor, y: torch.Tensor, logits: torch.Tensor) -> torch.Tensor | None:
    """[T, O, E], y [T, O], logits [T, E] -> [T, E]: what each expert's result is multiplied by in y.

    None where y is no such sum. Only as many of the likeliest experts are asked as there are numbers to tell them by.
    """
    most = max(1, min(results.shape[-1], results.shape[1] // 2))
    likely = logits.topk(most, dim=-1).indices
    a = results.double().gather(2, likely[:, None].expand(-1, results.shape[1], -1))
    if not bool(torch.isfinite(a).all() and torch.isfinite(y).all()):
        return None
    found = torch.linalg.lstsq(a, y.double().unsqueeze(-1)).solution
    gap = (a @ found).squeeze(-1) - y
    if bool((gap.norm(dim=-1) > 1e-4 * y.double().norm(dim=-1)).any()):
        return None
    found = found.squeeze(-1)
    found = torch.where(found.abs() > 1e-4 * found.abs().amax(), found, 0.0)
    return torch.zeros(logits.shape, dtype=torch.double).scatter(1, likely, found)
