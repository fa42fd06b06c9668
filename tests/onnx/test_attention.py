"""Attention as it is exported, against torch's. B batch, H heads, T tokens, C a head's width."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from moec.backends.onnx.runtime import run, session
from moec.exporter.attention import translations


class Attend(torch.nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *mask: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, mask[0] if mask else None, **self.options)


def exported(model: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> Any:
    program = torch.export.export(model, given, strict=False)
    found = torch.onnx.export(program, dynamo=True, custom_translation_table=translations(), verbose=False)
    assert found is not None
    return found.model


def tensors(heads: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(2, 4, 5, 8), torch.randn(2, heads, 5, 8), torch.randn(2, heads, 5, 8)


@pytest.mark.parametrize("shape", [(5, 5), (2, 1, 5, 5)], ids=str)
def test_a_boolean_mask(shape: tuple[int, ...]) -> None:
    """With queries that see all keys, some and none, and one that is no number."""
    q, k, v = tensors()
    q[1, 2, 3] = float("nan")
    mask = torch.rand(shape) < 0.5
    mask[..., 0, :], mask[..., 3, :], mask[..., 1, :], mask[..., 2, 1] = True, True, False, True
    model = exported(Attend(), (q, k, v, mask))
    assert not {"IsNaN"} & {node.op_type for node in model.graph}
    (mine,) = run(session(model), [q, k, v, mask])
    theirs = scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=2e-6, equal_nan=True)
    assert mine.isnan().sum() == 8
    assert not mine[0, :, 1].any()


@pytest.mark.parametrize("options", [{}, {"is_causal": True, "scale": 0.3}], ids=str)
def test_without_a_mask(options: dict[str, Any]) -> None:
    given = tensors()
    (mine,) = run(session(exported(Attend(**options), given)), given)
    torch.testing.assert_close(mine, scaled_dot_product_attention(*given, **options), rtol=2e-6, atol=2e-6)


def test_a_mask_of_numbers() -> None:
    given = (*tensors(), torch.randn(5, 5))
    (mine,) = run(session(exported(Attend(), given)), given)
    torch.testing.assert_close(mine, scaled_dot_product_attention(*given), rtol=2e-6, atol=2e-6)


def test_fewer_heads_of_keys() -> None:
    given = (*tensors(heads=2), torch.ones(5, 5, dtype=torch.bool).tril())
    (mine,) = run(session(exported(Attend(enable_gqa=True), given)), given)
    theirs = scaled_dot_product_attention(*given, enable_gqa=True)
    torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=2e-6)
