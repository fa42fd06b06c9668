"""What the front end found of one layer: the cut, the formula, the region, and how to call and to check it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from moec.frontends.torch.body import Body
from moec.frontends.torch.calls import Call
from moec.ir import Region
from moec.verify import Probe
from moec.weights import View


@dataclass(frozen=True)
class Lifted:
    """`module.<method>` computes `region`, reached through `call`; `probes` are made afresh on each use."""

    name: str
    kind: Literal["moe", "ffn"]
    cut: Literal["submodule", "slice", "ffn"]
    module: torch.nn.Module
    method: str
    call: Call
    body: Body
    region: Region
    views: Mapping[str, View | tuple[View, ...]]
    replaced: tuple[str, ...]
    evidence: tuple[str, ...]
    probes: Callable[[], Iterator[Probe]]
    dtype: torch.dtype
    named: Region | None = None
    """The layer from its router's logits on, where routing and capacity were proved by value; it is not what runs."""

    @property
    def longest(self) -> int:
        """Terms of the longest reduction."""
        return max(
            bank.shape[1] for role, bank in self.body.banks.items() if role.startswith(("w_up", "w_down", "w_layer"))
        )

    @property
    def original(self) -> Callable[..., Any]:
        return getattr(type(self.module), self.method).__get__(self.module)  # type: ignore[no-any-return]
