"""The operator `moec::layer` in graphs, and what it refuses when it is called.

B sequences, S tokens a sequence, D width.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import moec
from moec import MoecError
from tests.frontend import changing
from tests.frontend.changing import Direct, Plain
from tests.frontend.test_callers import agrees
from tests.frontend.traced import both, exported, layers_in, tokens

pytestmark = pytest.mark.filterwarnings("ignore")


def test_backward_through_an_exported_program_is_refused() -> None:
    _, fast = both(Direct)
    with pytest.raises(MoecError, match="no backward") as told_:
        exported(fast).module()(tokens(2, 5)).sum().backward()
    assert told_.value.code == "MOEC235"


def test_values_outside_of_what_was_verified_are_an_error() -> None:
    _, fast = both(Direct)
    program = torch.export.export(
        fast.experts, (tokens(1, 6)[0], torch.zeros(6, 2, dtype=torch.int64), torch.ones(6, 2))
    )
    assert layers_in(program) == 1
    with pytest.raises(MoecError, match="expert id 40") as told_:
        program.module()(tokens(1, 6)[0], torch.full((6, 2), 40), torch.ones(6, 2))
    assert told_.value.code == "MOEC234"


def test_text_that_describes_no_layer_is_refused() -> None:
    with pytest.raises(MoecError, match="describes no layer") as told_:
        torch.ops.moec.layer(torch.zeros(2, 3), None, None, [torch.zeros(3, 3)], "{}", "")
    assert told_.value.code == "MOEC234"


def test_other_layouts_of_weights_are_refused() -> None:
    _, fast = both(Plain)
    program = exported(fast)
    (node,) = [n for n in program.graph.nodes if n.target is torch.ops.moec.layer.default]
    text = node.args[4]
    with pytest.raises(MoecError, match="was compiled with") as told_:
        torch.ops.moec.layer(tokens(1, 3)[0], None, None, [torch.zeros(2, 2)] * len(node.args[3]), text, "")
    assert told_.value.code == "MOEC230"


class Scaled(nn.Module):
    """Experts whose result is multiplied by a number, as after a dropout that was folded into eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(changing.Expert() for _ in range(changing.E))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None] * 0.8)
        return out


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(changing.D, changing.E), Scaled()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, changing.D)
        weights, ids = self.router(rows).softmax(-1).topk(2)
        y: Tensor = self.experts(rows, ids, weights)
        return y.view_as(x)


def test_numbers_that_results_are_multiplied_by_are_in_the_graph() -> None:
    torch.manual_seed(1)
    model = Around().eval()
    fast = moec.compile(model, strict=True)
    program = exported(fast)
    assert layers_in(program) == 1
    agrees(program.module()(tokens(3, 7)), model(tokens(3, 7)))


def test_no_tokens() -> None:
    _, fast = both(Direct)
    program = exported(fast)
    (node,) = [n for n in program.graph.nodes if n.target is torch.ops.moec.layer.default]
    params = [dict(fast.named_parameters())[n] for n in program.graph_signature.parameters if "router" not in n]
    ids, weights = torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)
    y = torch.ops.moec.layer(torch.zeros(0, changing.D), ids, weights, params, node.args[4], "")
    assert y.shape == (0, changing.D)
