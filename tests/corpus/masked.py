"""Experts that clear rows: those of ids that stand for no expert, or others that few tokens do not show.

T tokens, K experts a token, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.corpus.blocks import softmax_topk_renorm
from tests.corpus.case import case
from tests.corpus.wider import EXPERTS, TOP_K, Bank, Block


class Sentinels(Bank):
    """Slots sorted by expert, weights gathered; ids from E on are sorted behind the others and cleared."""

    def cleared(self, ids: Tensor, rows: Tensor) -> Tensor:
        """Rows that are cleared, bool [T * K, 1]."""
        return (ids >= EXPERTS).unsqueeze(-1)

    def clear(self, rows: Tensor, mask: Tensor) -> Tensor:
        return rows.masked_fill(mask, 0.0)

    def hide(self, rows: Tensor, mask: Tensor) -> Tensor:
        return self.clear(rows, mask)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        picked, order = ids.flatten().sort()
        rows = x[order // TOP_K]
        mask = self.cleared(picked, rows)
        picked = picked.clamp(max=EXPERTS - 1)
        rows.masked_fill_((ids.flatten()[order] >= EXPERTS)[:, None], 0.0)
        hidden = self.hide(torch.bmm(self.gate_up[picked], rows[..., None])[..., 0], mask)
        gate, up = hidden.chunk(2, dim=-1)
        out = torch.bmm(self.down[picked], (F.silu(gate) * up)[..., None])[..., 0]
        out = self.clear(out, mask) * weights.flatten()[order, None]
        return out[order.argsort()].view(-1, TOP_K, x.shape[-1]).sum(1)


def unmasked(module: Block, x: Tensor) -> Tensor:
    """A careless reading: no row is ever cleared."""
    rows = x.reshape(-1, x.shape[-1])
    weights, ids = softmax_topk_renorm(module.router(rows), TOP_K)
    out: Tensor = Bank.forward(module.experts, rows, ids, weights)
    return out.view_as(x)


@case("masked.sentinel", expect="compiled")
class Sentinel(Block):
    """Rows of ids behind the last expert are cleared between the layers and after them; no id is one."""

    bank = Sentinels


class _InPlace(Sentinels):
    def clear(self, rows: Tensor, mask: Tensor) -> Tensor:
        return rows.masked_fill_(mask, 0.0)


@case("masked.in_place", expect="compiled")
class InPlace(Block):
    """The same rows cleared in place, where the first layer's results lie."""

    bank = _InPlace


class _Where(Sentinels):
    def cleared(self, ids: Tensor, rows: Tensor) -> Tensor:
        return ((ids >= 0) & (ids < EXPERTS)).unsqueeze(-1)

    def clear(self, rows: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, rows, torch.zeros_like(rows))


@case("masked.where", expect="compiled")
class Where(Block):
    """Rows kept where both ends of the ids' range say so, zeros elsewhere."""

    bank = _Where


class _Product(Sentinels):
    def cleared(self, ids: Tensor, rows: Tensor) -> Tensor:
        return (ids < EXPERTS).to(rows.dtype).unsqueeze(-1)

    def clear(self, rows: Tensor, mask: Tensor) -> Tensor:
        return rows * mask


@case("masked.product", expect="compiled")
class Product(Block):
    """Rows multiplied by one where the id is an expert's, by zero elsewhere."""

    bank = _Product


class _LastExpert(Sentinels):
    def cleared(self, ids: Tensor, rows: Tensor) -> Tensor:
        return (ids >= EXPERTS - 1).unsqueeze(-1)


@case("masked.last_expert", expect="left alone", decoy=unmasked, min_experts=1)
class LastExpert(Block):
    """One off: the last expert's rows are cleared as well."""

    bank = _LastExpert


class _Sevens(Sentinels):
    def clear(self, rows: Tensor, mask: Tensor) -> Tensor:
        return rows.masked_fill(mask, 7.0)


@case("masked.sevens", expect="left alone", reason=("are set to 7",))
class Sevens(Block):
    """Rows of ids behind the last expert become sevens, which an expert's second layer takes for values."""

    bank = _Sevens


class _LatePlace(Sentinels):
    def cleared(self, ids: Tensor, rows: Tensor) -> Tensor:
        return (torch.arange(len(ids)) >= EXPERTS * 400).unsqueeze(-1)


@case("masked.late_place", expect="left alone", reason=("arange",), decoy=unmasked, decoy_tokens=2600)
class LatePlace(Block):
    """Rows from the 2400th on are cleared: no call of few tokens has one."""

    bank = _LatePlace


class _Queue(Sentinels):
    def cleared(self, ids: Tensor, rows: Tensor) -> Tensor:
        place = F.one_hot(ids, EXPERTS).cumsum(0).gather(1, ids[:, None])
        return place > EXPERTS * 110


@case("masked.queue", expect="left alone", reason=("cumsum",), decoy=unmasked, decoy_tokens=2600)
class Queue(Block):
    """A queue of 660 rows for each expert: only many tokens fill one."""

    bank = _Queue


class _Loud(Sentinels):
    def cleared(self, ids: Tensor, rows: Tensor) -> Tensor:
        return rows.abs().amax(-1, keepdim=True) > 1e4


@case("masked.loud", expect="left alone", reason=("amax", "gt"), decoy=unmasked, decoy_scale=1e4)
class Loud(Block):
    """Rows with an element beyond ten thousand are cleared."""

    bank = _Loud


class _AfterPlace(_LatePlace):
    def hide(self, rows: Tensor, mask: Tensor) -> Tensor:
        return rows


@case("masked.after_place", expect="left alone", reason=("arange",), decoy=unmasked, decoy_tokens=2600)
class AfterPlace(Block):
    """Results from the 2400th on are cleared behind the experts' layers, nothing between them."""

    bank = _AfterPlace


class _AfterQueue(_Queue):
    def hide(self, rows: Tensor, mask: Tensor) -> Tensor:
        return rows

    def clear(self, rows: Tensor, mask: Tensor) -> Tensor:
        return rows * ~mask


@case("masked.after_queue", expect="left alone", reason=("cumsum",), decoy=unmasked, decoy_tokens=2600)
class AfterQueue(Block):
    """Results beyond a queue of 660 rows for each expert are multiplied by zero behind the experts' layers."""

    bank = _AfterQueue
