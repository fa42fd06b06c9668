"""What the operator `moec::layer` is told about a layer as text: its region, its weights' places, how it is routed.

T tokens, K experts per token, D inputs, O outputs.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from itertools import groupby

import torch

from moec.errors import MoecError
from moec.frontends.torch.direct import Roles
from moec.frontends.torch.ids import Ids
from moec.frontends.torch.operands import Bank, Table
from moec.ir import Region, parse


@dataclass(frozen=True)
class Spec:
    """A layer's region and how it is called."""

    name: str
    region: str
    backend: str
    pack: bool
    table: Table
    roles: Roles
    experts: int
    inputs: int
    lowest: int | None
    highest: int | None
    width: int
    dtype: str
    no_gradients: str = "it was compiled without training=True"
    """Why it has no backward; empty if it has."""

    def to_text(self) -> str:
        """One line of JSON."""
        table = {
            "banks": {ref: bank.to_data() for ref, bank in self.table.banks.items()},
            "layouts": [
                [list(shape), list(stride), len(list(run))] for (shape, stride), run in groupby(self.table.layouts)
            ],
        }
        return json.dumps({**vars(self), "table": table, "roles": vars(self.roles)}, separators=(",", ":"))

    @classmethod
    def of(cls, text: str) -> Spec:
        """What `to_text` was given. Raises MOEC234 for text that is something else."""
        try:
            data = json.loads(text)
            table = data.pop("table")
            banks = {ref: Bank.of(one) for ref, one in table["banks"].items()}
            layouts = tuple((tuple(shape), tuple(stride)) for shape, stride, n in table["layouts"] for _ in range(n))
            return cls(**{**data, "table": Table(banks, layouts), "roles": Roles(**data["roles"])})
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise MoecError(
                "MOEC234",
                f"moec::layer was given text that describes no layer: {error}",
                hint="export the model again with the release of moec that runs it",
            ) from error


spec_of = functools.lru_cache(maxsize=1024)(Spec.of)


@functools.lru_cache(maxsize=1024)
def region_of(layer: str) -> Region:
    """The region of a Spec's text."""
    return parse(spec_of(layer).region)


def routing_of(
    spec: Spec, x: torch.Tensor, tokens: int, selector: torch.Tensor | None, weights: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """experts [T, K] and weights [T, K], or nothing for a plain FFN. Raises Unusual for values not verified."""
    roles = spec.roles
    if roles.form is None:
        return ()
    if spec.lowest is not None and spec.highest is not None and selector is not None:
        Ids(spec.lowest, spec.highest).check(selector)
    given = {roles.x: x, roles.selector: selector, roles.weights: weights}
    return roles.routing({name: tensor for name, tensor in given.items() if name is not None}, tokens, spec.experts)
