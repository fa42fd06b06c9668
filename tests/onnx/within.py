"""Files whose layers stand in graphs that nodes run, as torch's exporters write them. T tokens."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from tests.onnx.written import Dense, by_torch, quiet


class Branches(nn.Module):
    """One module in both branches, the second time on other values: x[T, 16] -> [T, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = Dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.cond(x.sum() > 0, lambda x: x + self.moe(x), lambda x: self.moe(2 * x), (x,))
        return y


class Turns(nn.Module):
    """A layer, then another one three times over: x[T, 16] -> [T, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.moe = Dense(), Dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def further(turn: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
            return turn < 3

        def step(turn: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return turn + 1, x + h.tanh() + self.moe(h)

        started = x + self.first(x)
        _, y = torch._higher_order_ops.while_loop(further, step, (torch.tensor(0), started))
        return y  # type: ignore[no-any-return]


class Steps(nn.Module):
    """A state that takes in one slice after the other: xs[4, 7, 16], state[7, 16] -> [4, 7, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = Dense()

    def forward(self, xs: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        from torch._higher_order_ops.scan import scan

        def step(state: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            found = state.tanh() + self.moe(x + state)
            return found, found.clone()

        y: torch.Tensor = scan(step, state, xs, dim=0)[1]
        return y


class Guarded(nn.Module):
    """Each expert behind an If, where no token asked for it: x[T, 16] -> [T, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 5, bias=False)
        self.up = nn.ModuleList(nn.Linear(16, 24) for _ in range(5))
        self.down = nn.ModuleList(nn.Linear(24, 16) for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(x)
        for e, (up, down) in enumerate(zip(self.up, self.down)):  # noqa: B905 as TorchScript has it
            places = torch.nonzero(chosen == e)
            if places.shape[0] > 0:
                token, slot = places[:, 0], places[:, 1]
                out = out.index_add(0, token, down(torch.relu(up(x[token]))) * weights[token, slot].unsqueeze(-1))
        return out


class Counted(nn.Module):
    """A Loop over experts, which takes their weights by the number of its turn: x[T, 16] -> [T, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 5, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(5, 48, 16) / 4), nn.Parameter(torch.randn(5, 16, 24) / 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(x)
        e = 0
        while e < int(chosen.max()) + 1:
            places = torch.nonzero(chosen == e)
            token, slot = places[:, 0], places[:, 1]
            h = F.linear(x[token], self.up[e])
            y = F.linear(F.silu(h[:, :24]) * h[:, 24:], self.down[e])
            out = out.index_add(0, token, y * weights[token, slot].unsqueeze(-1))
            e += 1
        return out


def branches(path: Path) -> Path:
    torch.manual_seed(0)
    return by_torch(Branches(), torch.randn(7, 16), path, "x")


def turns(path: Path) -> Path:
    torch.manual_seed(0)
    return by_torch(Turns(), torch.randn(7, 16), path, "x")


def steps(path: Path) -> Path:
    """Its sizes are fixed: torch's exporter writes no Scan of others."""
    torch.manual_seed(0)
    example = torch.randn(4, 7, 16), torch.zeros(7, 16)
    with quiet():
        program = torch.onnx.export(Steps().eval(), example, dynamo=True, input_names=["xs", "state"], verbose=False)
        assert program is not None
        program.save(path)
    return path


def scripted(model: nn.Module, path: Path) -> Path:
    """TorchScript, whose Ifs and loops stay, by the legacy exporter."""
    with quiet():
        torch.onnx.export(
            torch.jit.script(model.eval()), (torch.randn(40, 16),), str(path), dynamo=False, input_names=["x"],
            dynamic_axes={"x": {0: "n"}}, opset_version=17,
        )  # fmt: skip
    return path
