"""Expert ids outside of 0..E-1: what the original does with them, a compiled layer does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moec
from moec.frontends.torch import ids
from moec.frontends.torch.routing import Unusual
from tests.frontend.modules import told

T, D, WIDE, E = 6, 8, 12, 4
Loop = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


def ignoring(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """A loop over the experts there are: other ids have none."""
    out = torch.zeros_like(x)
    for e in range(E):
        token, slot = torch.where(ids == e)
        out.index_add_(0, token, m.expert(e, x[token]) * weights[token, slot, None])
    return out


def indexing(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """A list: too large an id raises, a negative one counts from the end."""
    out = torch.zeros_like(x)
    for e in ids.unique().tolist():
        token, slot = torch.where(ids == e)
        out.index_add_(0, token, m.expert(e, x[token]) * weights[token, slot, None])
    return out


def with_one_more(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """E is no expert, as libraries mark dropped tokens; anything else raises."""
    mask = F.one_hot(ids, E + 1)[..., :E]
    out = torch.zeros_like(x)
    for e in range(E):
        token, slot = torch.where(mask[..., e] == 1)
        out.index_add_(0, token, m.expert(e, x[token]) * weights[token, slot, None])
    return out


def cleared(m: Any, x: Tensor, ids: Tensor, weights: Tensor, fill: float = 0.0) -> Tensor:
    """All slots at once: rows of ids from E on are cleared between the layers and after them."""
    slots = ids.flatten()
    mask, e = (slots >= E)[:, None], slots.clamp(max=E - 1)
    up, down = (torch.stack([layer.weight for layer in part])[e] for part in (m.up, m.down))
    before, after = (torch.stack([layer.bias for layer in part])[e] for part in (m.up, m.down))
    hidden = (torch.bmm(up, x.repeat_interleave(2, 0)[..., None])[..., 0] + before).masked_fill(mask, 0.0)
    out = (torch.bmm(down, F.silu(hidden)[..., None])[..., 0] + after).masked_fill(mask, fill)
    return (out * weights.flatten()[:, None]).view(len(x), 2, D).sum(1)


def counted(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The same, but such a slot adds ones times its weight."""
    return cleared(m, x, ids, weights, 1.0)


class Experts(nn.Module):
    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(D, WIDE) for _ in range(E))
        self.down = nn.ModuleList(nn.Linear(WIDE, D) for _ in range(E))
        self.loop = loop

    def expert(self, e: int, rows: Tensor) -> Tensor:
        y: Tensor = self.down[e](F.silu(self.up[e](rows)))
        return y

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return self.loop(self, x, ids, weights)


class Layer(nn.Module):
    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self.router = nn.Linear(D, E)
        self.experts = Experts(loop)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(2)
        y: Tensor = self.experts(x, ids, weights)
        return y


def outcome(model: nn.Module, *args: Tensor) -> Tensor | str:
    try:
        with torch.no_grad():
            y: Tensor = model(*args)
            return y
    except Exception as error:
        return f"{type(error).__name__}: {error}"


UNDERSTOOD: dict[Loop, tuple[int, ...]] = {
    ignoring: (-1, E),
    indexing: (),
    with_one_more: (E,),
    cleared: (E,),
    counted: (),
}


@pytest.mark.parametrize("stray", [-7, -1, E, E + 1])
@pytest.mark.parametrize("loop", [ignoring, indexing, with_one_more, cleared, counted])
def test_strays_are_the_originals_business(loop: Loop, stray: int) -> None:
    torch.manual_seed(2)
    model = Layer(loop).eval()
    fast = moec.compile(model)
    (layer,) = fast.moec.report.layers
    assert (layer.status, layer.cut) == ("compiled", "submodule"), layer.reason
    x, weights, ids = torch.randn(T, D), torch.rand(T, 2), torch.randint(E, (T, 2))
    ids[1, 1] = stray
    with told() as texts:
        got = outcome(fast.experts, x, ids, weights)
    want = outcome(model.experts, x, ids, weights)
    if isinstance(want, Tensor):
        assert isinstance(got, Tensor)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    else:
        assert got == want
    compiled = stray in UNDERSTOOD[loop]
    assert layer.fallbacks == (0 if compiled else 1)
    assert compiled or any(f"expert id {stray}" in text for text in texts)


class Elsewhere:
    """Ids as a device other than the CPU holds them: a look at them would wait."""

    device = torch.device("meta")

    def __init__(self, *ids: int) -> None:
        self.ids = torch.tensor(ids)

    def numel(self) -> int:
        return self.ids.numel()

    def reshape(self, size: int) -> Tensor:
        return self.ids.reshape(size)


def test_other_devices_are_looked_at_when_debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = ids.Ids(0, E - 1)
    allowed.check(Elsewhere(0, E))  # type: ignore[arg-type]
    monkeypatch.setattr(ids, "DEBUG", True)
    allowed.check(Elsewhere(0, E - 1))  # type: ignore[arg-type]
    with pytest.raises(Unusual, match=f"expert id {E} is not in 0..{E - 1}"):
        allowed.check(Elsewhere(0, E))  # type: ignore[arg-type]
