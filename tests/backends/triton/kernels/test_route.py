"""The routing kernel against the meaning of the op: every score, groups, biases, ties and not-a-numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from moec.backends.reference.routing import route
from moec.ir import Builder, Route, Tensor
from tests.backends.triton.kernels.running import DEVICE

CASES: dict[str, dict[str, Any]] = {
    "softmax": {"k": 2},
    "renormalised": {"k": 3, "normalize": "sum", "eps": 1e-20, "scale": 2.5},
    "chosen": {"k": 4, "score": "softmax_chosen"},
    "sigmoid in groups": {
        "k": 4, "score": "sigmoid", "groups": 4, "kept_groups": 2, "group_score": "top2", "group_fill": "zero",
        "normalize": "sum", "eps": 1e-20, "bias": True,
    },
    "groups by the best": {"k": 2, "groups": 3, "kept_groups": 1, "experts": 12},
    "biased logits": {"k": 2, "bias": True, "bias_on": "logits"},
    "square roots": {"k": 2, "score": "sqrt_softplus", "normalize": "clamped_sum", "eps": 0.5},
    "norm": {"k": 3, "score": "sigmoid", "normalize": "norm", "p": 2.0},
    "another norm": {"k": 3, "score": "sigmoid", "normalize": "norm", "p": 3.0},
    "noise": {"k": 2, "noise": True, "score": "identity"},
    "one of seven": {"k": 1, "experts": 7},
    "all": {"k": 5, "experts": 5},
}  # fmt: skip


def router(case: dict[str, Any]) -> tuple[Any, Route, list[torch.Tensor | None]]:
    from moec.backends.triton.kernels.route import Router

    more = dict(case)
    experts = more.pop("experts", 16)
    b = Builder("layer")
    logits = b.input("logits", Tensor.of("f32", "T", experts))
    generator = torch.Generator().manual_seed(3)
    given: list[torch.Tensor | None] = [torch.randn(37, experts, generator=generator), None, None]
    if more.pop("bias", False):
        more["bias"] = b.input("bias", Tensor.of("f32", experts))
        given[1] = torch.randn(experts, generator=generator)
    if more.pop("noise", False):
        more["noise"] = b.input("noise", Tensor.of("f32", "T", experts))
        given[2] = torch.randn(37, experts, generator=generator)
    op = Route(logits, **more)
    op.infer()
    return Router(op), op, given


def on_device(given: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    return [None if x is None else x.to(DEVICE) for x in given]


@pytest.mark.parametrize("name", CASES)
def test_cases(name: str) -> None:
    run, op, given = router(CASES[name])
    weights, ids = run(*on_device(given))
    wanted, wanted_ids = route(op, *given)  # type: ignore[arg-type]
    assert torch.equal(ids.cpu(), wanted_ids)
    assert torch.allclose(weights.cpu(), wanted, rtol=2e-6, atol=1e-7)


def test_the_lower_expert_among_equals() -> None:
    run, op, given = router({"k": 3, "score": "identity"})
    logits = torch.zeros(3, 16)
    logits[1, 3:9] = 1
    logits[2, ::2] = -0.0
    given[0] = logits
    _, ids = run(*on_device(given))
    assert torch.equal(ids.cpu(), route(op, logits, None, None)[1])


def test_bad_numbers_stay_in_their_row() -> None:
    run, _, given = router({"k": 2, "normalize": "sum"})
    clean, clean_ids = run(*on_device(given))
    logits = given[0]
    assert logits is not None
    logits[4, 7], logits[5, 2], logits[6] = float("nan"), float("inf"), -float("inf")
    weights, ids = run(*on_device(given))
    rest = torch.ones(37, dtype=torch.bool)
    rest[4:7] = False
    assert torch.equal(weights.cpu()[rest], clean.cpu()[rest])
    assert torch.equal(ids.cpu()[rest], clean_ids.cpu()[rest])
    assert bool(((ids >= 0) & (ids < 16)).all())


def test_16_bit_logits_and_no_tokens() -> None:
    run, op, given = router({"k": 2})
    logits = given[0]
    assert logits is not None
    half = logits.bfloat16()
    weights, ids = run(half.to(DEVICE))
    wanted, wanted_ids = route(op, half, None, None)
    assert torch.equal(ids.cpu(), wanted_ids)
    assert torch.allclose(weights.cpu(), wanted, rtol=2e-6, atol=1e-7)
    assert run(half[:0].to(DEVICE))[1].shape == (0, 2)
