"""The expert body as a formula, y_t = sum_k w[t, k] * f_{e[t, k]}(x_t), and its value from the user's own parameters.

T tokens, K experts per token, E experts, C inputs, N outputs of an expert. The evaluation is the front end's own, apart
from every back end: it decides which tensors of a log are x, e and w, and it is the fp32 judge of 16-bit layers. One
expert's weights are widened at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from moec.frontends.torch.activation import Activation, constants, name_activation
from moec.frontends.torch.banks import Bank
from moec.frontends.torch.instances import Instance, NotLifted
from moec.frontends.torch.oplog import Log
from moec.frontends.torch.replay import replay
from moec.weights import View


@dataclass(frozen=True)
class Body:
    """`banks` by role (w_up0, b_up0, w_up1, b_up1, w_down, b_down) and what happens between the two layers."""

    banks: Mapping[str, Bank]
    activation: Activation | None

    @property
    def experts(self) -> int:
        return len(self.banks["w_up0"].views)

    @property
    def inputs(self) -> int:
        return self.banks["w_up0"].shape[1]

    @property
    def outputs(self) -> int:
        return self.banks["w_down" if "w_down" in self.banks else "w_up0"].shape[0]

    @property
    def params(self) -> frozenset[str]:
        return frozenset(view.param for bank in self.banks.values() for view in bank.views)

    def expert(self, params: Mapping[str, torch.Tensor], index: int, rows: torch.Tensor) -> torch.Tensor:
        """f_index(rows): rows [R, C] -> [R, N], in rows' dtype."""

        def read(role: str) -> torch.Tensor | None:
            bank = self.banks.get(role)
            return None if bank is None else view_tensor(params, bank.views[index]).to(rows.dtype)

        def product(x: torch.Tensor, which: str) -> torch.Tensor:
            weight, bias = read(f"w_{which}"), read(f"b_{which}")
            assert weight is not None
            return torch.nn.functional.linear(x, weight, bias)

        hidden = [product(rows, f"up{i}") for i in range(2) if f"w_up{i}" in self.banks]
        if self.activation is None:
            return hidden[0]
        return product(self.activation(hidden), "down")

    def evaluate(
        self,
        params: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        experts: torch.Tensor,
        weights: torch.Tensor,
        *,
        on_input: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """x [T, C], experts [T, K] (E means none), weights [T, K] -> [T, N] in `dtype`.

        `on_input` applies the weights to x instead of to the experts' results.
        """
        x, weights = x.to(dtype), weights.to(dtype)
        out = torch.zeros(x.shape[0], self.outputs, dtype=dtype, device=x.device)
        for expert in torch.unique(experts).tolist():
            if not 0 <= expert < self.experts:
                continue
            token, slot = torch.where(experts == expert)
            factor = weights[token, slot, None]
            rows = x[token] * factor if on_input else x[token]
            y = self.expert(params, expert, rows)
            out.index_add_(0, token, y if on_input else y * factor)
        return out


def view_tensor(params: Mapping[str, torch.Tensor], view: View) -> torch.Tensor:
    param = params[view.param].detach()
    return param.as_strided(view.shape, view.stride, param.storage_offset() + view.offset)


def build_body(log: Log, instances: Sequence[Instance], banks: Sequence[Bank]) -> Body:
    """Name the activation and put the body together; raises NotLifted when it has no name."""
    named = {bank.role: bank for bank in banks}
    # An expert may have run without rows; one that had many answers best.
    instance = max(instances, key=lambda i: log.tensors[i.rows].numel())
    if instance.down is None:
        return Body(named, None)
    activation = name_activation(
        lambda hidden: _ask(log, instance, hidden),
        [up.weight.shape[0] for up in instance.ups],
        instance.down.weight.shape[1],
        constants(log, instance.middle),
        1e-5 if log.tensors[instance.down.source].dtype in (torch.float32, torch.float64) else 2e-2,
    )
    if activation is None:
        ops = [log.entries[i].name for i in instance.middle]
        raise NotLifted(f"the operations between the experts' layers have no name here: {', '.join(ops[:8]) or 'none'}")
    return Body(named, activation)


def _ask(log: Log, instance: Instance, hidden: list[torch.Tensor]) -> torch.Tensor:
    """What the recorded entries make of one hidden vector; every row gets the same one."""
    assert instance.down is not None
    given = {}
    for up, vector in zip(instance.ups, hidden, strict=True):
        like = log.tensors[up.out]
        wide = vector.to(like.device, torch.float64 if like.dtype == torch.float64 else torch.float32)
        given[up.out] = wide.expand(like.shape).clone()
    try:
        answer = replay(log, instance.middle, given, instance.down.source)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise NotLifted(f"the operations between the experts' layers cannot be run again: {error}") from error
    rows = answer.reshape(-1, answer.shape[-1])
    if not rows.shape[0]:
        raise NotLifted("no expert had a row in the probe")
    # Vectorised and scalar code of one function may differ in the last bit.
    if not torch.allclose(rows, rows[:1].expand(rows.shape), rtol=1e-5, atol=1e-6, equal_nan=True):
        raise NotLifted("equal rows of an expert get different results")
    return rows[0].float()
