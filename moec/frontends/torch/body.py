"""The expert body as a formula, y_t = sum_k w[t, k] * f_{e[t, k]}(x_t), and its value from the user's own parameters.

T tokens, K experts per token, E experts, C inputs, N outputs of an expert. The evaluation is the front end's own, apart
from every back end: it decides which tensors of a log are x, e and w, and it is the fp32 judge of 16-bit layers. One
expert's weights are widened at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from moec.frontends.torch.activation import Activation, constants, name_activation, nearest_name
from moec.frontends.torch.banks import Bank
from moec.frontends.torch.formula import Written, write_activation
from moec.frontends.torch.hiddenscale import check_scale
from moec.frontends.torch.instances import Instance, NotLifted
from moec.frontends.torch.oplog import Log
from moec.frontends.torch.replay import replay
from moec.frontends.torch.tail import Norm, name_tail
from moec.weights import View


@dataclass(frozen=True)
class Body:
    """`banks` by role (w_up0, b_up0, w_up1, b_up1, w_down, b_down) and what happens between the two layers.

    `tail` is a norm of each expert's result; its weight and bias (w_tail, b_tail) are banks too, of one view where all
    experts share them, as is a vector (w_scale) that multiplies the hidden values. Experts E..E+identities-1 have no
    weights and return their input.
    """

    banks: Mapping[str, Bank]
    activation: Activation | Written | None
    identities: int = 0
    tail: Norm | None = None

    @property
    def experts(self) -> int:
        return len(self.banks["w_up0"].views)

    @property
    def choices(self) -> int:
        """Ids that stand for an expert."""
        return self.experts + self.identities

    @property
    def inputs(self) -> int:
        return self.banks["w_up0"].shape[1]

    @property
    def outputs(self) -> int:
        return self.banks["w_down" if "w_down" in self.banks else "w_up0"].shape[0]

    @property
    def between(self) -> str:
        """What happens between the layers, for the evidence."""
        scale = self.banks.get("w_scale")
        whose = (
            "" if self.experts == 1 else " of all experts" if scale is not None and scale.shared else " of each expert"
        )
        return str(self.activation) if scale is None else f"{self.activation}, times a vector{whose}"

    @property
    def params(self) -> frozenset[str]:
        return frozenset(view.param for bank in self.banks.values() for view in bank.views)

    def expert(self, params: Mapping[str, torch.Tensor], index: int, rows: torch.Tensor) -> torch.Tensor:
        """f_index(rows): rows [R, C] -> [R, N], in rows' dtype."""

        def read(role: str) -> torch.Tensor | None:
            bank = self.banks.get(role)
            if bank is None:
                return None
            return view_tensor(params, bank.views[0 if bank.shared else index]).to(rows.dtype)

        def product(x: torch.Tensor, which: str) -> torch.Tensor:
            weight, bias = read(f"w_{which}"), read(f"b_{which}")
            assert weight is not None
            return torch.nn.functional.linear(x, weight, bias)

        hidden = [product(rows, f"up{i}") for i in range(2) if f"w_up{i}" in self.banks]
        if self.activation is None:
            out = hidden[0]
        else:
            scale, inner = read("w_scale"), self.activation(hidden)
            out = product(inner if scale is None else inner * scale, "down")
        return out if self.tail is None else self.tail(out, read("w_tail"), read("b_tail"))

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
        """x [T, C], experts [T, K] (ids that stand for no expert add nothing), weights [T, K] -> [T, N] in `dtype`.

        `on_input` applies the weights to x instead of to the experts' results.
        """
        x, weights = x.to(dtype), weights.to(dtype)
        out = torch.zeros(x.shape[0], self.outputs, dtype=dtype, device=x.device)
        for expert in torch.unique(experts).tolist():
            if not 0 <= expert < self.choices:
                continue
            token, slot = torch.where(experts == expert)
            factor = weights[token, slot, None]
            rows = x[token] * factor if on_input else x[token]
            y = self.expert(params, expert, rows) if expert < self.experts else rows
            out.index_add_(0, token, y if on_input else y * factor)
        return out


def view_tensor(params: Mapping[str, torch.Tensor], view: View) -> torch.Tensor:
    param = params[view.param].detach()
    return param.as_strided(view.shape, view.stride, param.storage_offset() + view.offset)


def build_body(
    log: Log, instances: Sequence[Instance], banks: Sequence[Bank], params: Mapping[str, torch.Tensor]
) -> Body:
    """Name the activation and put the body together; raises NotLifted when it has no name."""
    # An expert may have run without rows; one that had many answers best.
    instance = max(instances, key=lambda i: log.tensors[i.rows].numel())
    named = {bank.role: bank for bank in banks if not bank.role.endswith("_tail")}
    body = with_activation(log, instance, named)
    if not instance.tail:
        return body
    norm, places = name_tail(log, instance, [view_tensor(params, view) for view in instance.vectors])
    vectors = {bank.role: bank for bank in banks if bank.role.endswith("_tail")}
    for role, place in zip(("w_tail", "b_tail"), places, strict=True):
        if place is not None:
            named[role] = Bank(role, vectors[f"{place}_tail"].views)
    return replace(body, banks=named, tail=norm)


def with_activation(log: Log, instance: Instance, named: Mapping[str, Bank]) -> Body:
    """The body without what follows its last layer; raises NotLifted where what lies between the layers has no name."""
    if instance.down is None:
        return Body(named, None)
    widths, width = [up.weight.shape[0] for up in instance.ups], instance.down.weight.shape[1]
    tolerance = 1e-5 if log.tensors[instance.down.source].dtype in (torch.float32, torch.float64) else 2e-2

    def ask(hidden: list[torch.Tensor], vector: torch.Tensor | None = None) -> torch.Tensor:
        return _ask(log, instance, hidden, vector)

    if instance.scale is not None:
        check_scale(ask, widths, width, tolerance)
    activation = name_activation(ask, widths, width, constants(log, instance.middle), tolerance)
    if activation is not None:
        return Body(named, activation)
    written = write_activation(log, instance, width, ask, tolerance)
    if written is None:
        ops = [log.entries[i].name for i in instance.middle]
        close = nearest_name(ask, widths, width, constants(log, instance.middle))
        said = ", ".join(ops[:8]) or "none"
        raise NotLifted(f"the operations between the experts' layers have no name here: {said}", close)
    return written_body(named, written)


def written_body(named: Mapping[str, Bank], written: Written) -> Body:
    """The body of a formula: one matrix with two halves becomes two banks, whose views lie in it."""
    banks = dict(named)
    for role in ("w_up0", "b_up0") if written.split is not None else ():
        if role in banks:
            banks[role], banks[role[:-1] + "1"] = _halves(banks[role], interleaved=written.split == "interleaved")
    return Body(banks, written)


def _halves(bank: Bank, *, interleaved: bool) -> tuple[Bank, Bank]:
    """The bank's first and second outputs of each pair: halves, or every other one."""
    found = []
    for second in (0, 1):
        views = []
        for view in bank.views:
            count, step = view.shape[0] // 2, view.stride[0]
            offset = view.offset + second * (step if interleaved else count * step)
            stride = (2 * step if interleaved else step, *view.stride[1:])
            views.append(View(view.param, offset, (count, *view.shape[1:]), stride))
        found.append(Bank(bank.role[:-1] + str(second), tuple(views)))
    return found[0], found[1]


def _ask(log: Log, instance: Instance, hidden: list[torch.Tensor], scale: torch.Tensor | None = None) -> torch.Tensor:
    """What the recorded entries make of one hidden vector; every row gets the same one.

    `scale` stands for the one of parameters that multiplies them, ones where it is None.
    """
    assert instance.down is not None
    given = {mask.operand: mask.keeping(log) for mask in instance.masks}
    if instance.scale is not None:
        given[instance.scale.slot] = instance.scale.values(log, scale)
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
