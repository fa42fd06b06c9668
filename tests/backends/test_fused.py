"""expert_glu, expert_ffn and dense_ffn against a walk over tokens, and against the ops they stand for.

T tokens, K choices, E experts, D model width, F expert width, W output width.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moec.ir import Act, Combine, DenseFfn, ExpertFfn, ExpertGlu, Gather, Glu, Group, GroupedLinear
from tests.backends import oracle_rows
from tests.backends.oracle_numbers import listed, matrix, same_bits
from tests.backends.oracle_routing import group
from tests.backends.running import evaluate, evaluate_one
from tests.backends.shapes import Routing, each_float, each_routing, some, strided

NAN, INF = float("nan"), float("inf")
# Relative to the largest number of the result: several roundings lie between. Values between need not be rounded.
CLOSE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
FORMS: list[dict[str, Any]] = [
    {"fn": "silu", "layout": "concat"},
    {"fn": "gelu_tanh", "layout": "concat_up_first"},
    {"fn": "silu", "layout": "interleaved", "alpha": 1.702, "limit": 0.5, "up_shift": 1.0},
    {"fn": "relu", "layout": "interleaved_up_first"},
    {"fn": "silu", "layout": "pair"},
    {"fn": "gelu", "layout": "none"},
    {"fn": "softplus", "layout": "none", "limit": 0.3, "clamp_after": True},
]
each_form = pytest.mark.parametrize("at", FORMS, ids=lambda at: f"{at['fn']}-{at['layout']}")
D, F, W = 6, 4, 5


def weights_of(experts: int, at: dict[str, Any], dtype: torch.dtype, *, biased: bool) -> dict[str, torch.Tensor]:
    """Random operands by the names that expert_ffn has for them."""
    outputs = F if at["layout"] in ("none", "pair") else 2 * F
    found = {"w_in": some(experts, outputs, D, dtype=dtype), "w_out": some(experts, W, F, dtype=dtype)}
    if at["layout"] == "pair":
        found["w_up"] = some(experts, outputs, D, dtype=dtype)
    if biased:
        found |= {"b_in": some(experts, outputs, dtype=dtype), "b_out": some(experts, W, dtype=torch.float32)}
        if at["layout"] == "pair":
            found["b_up"] = some(experts, outputs, dtype=dtype)
    return found


def check_near(found: torch.Tensor, expected: list[list[float]], width: int) -> None:
    """Within the bar of the type, relative to the largest number; not-a-numbers in the same places."""
    exact = torch.tensor(expected, dtype=torch.float64).reshape(-1, width)
    assert found.shape == exact.shape
    assert torch.equal(found.isnan(), exact.isnan())
    gap = (found.double() - exact).nan_to_num().abs()
    assert gap.numel() == 0 or gap.max() <= CLOSE[found.dtype] * exact.nan_to_num().abs().max().clamp(min=1.0)


def _listed(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: tensor.double().tolist() for name, tensor in weights.items()}


@each_routing
@each_form
@pytest.mark.parametrize("biased", [False, True])
def test_expert_ffn_is_a_walk_over_tokens(routing: Routing, at: dict[str, Any], biased: bool) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = some(routing.ids.shape[0], D, dtype=dtype)
        factors = some(*routing.ids.shape)
        weights = weights_of(routing.experts, at, dtype, biased=biased)
        expected = oracle_rows.expert_ffn(matrix(x), routing.ids.tolist(), matrix(factors), at, _listed(weights), W)
        hit = set(routing.ids.flatten().tolist())
        for e in range(routing.experts):
            if e not in hit:
                for bank in weights.values():
                    bank[e] = NAN
        found = evaluate_one(ExpertFfn, {"x": x, "experts": routing.ids, "weights": factors, **weights}, **at)
        assert found.dtype == dtype
        check_near(found, expected, W)


@each_float
@each_form
def test_expert_ffn_of_x_with_strides_and_transposed_weights(dtype: torch.dtype, at: dict[str, Any]) -> None:
    ids = torch.randint(0, 4, (9, 2))
    x, factors = some(9, D, dtype=dtype), some(9, 2)
    weights = weights_of(4, at, dtype, biased=True)
    operands = {"experts": ids, "weights": factors}
    expected = oracle_rows.expert_ffn(matrix(x), ids.tolist(), matrix(factors), at, _listed(weights), W)
    turned = {name: w.transpose(1, 2).contiguous().transpose(1, 2) if w.ndim == 3 else w for name, w in weights.items()}
    for same in strided(x):
        check_near(evaluate_one(ExpertFfn, {"x": same, **operands, **weights}, **at), expected, W)
    check_near(evaluate_one(ExpertFfn, {"x": x, **operands, **turned}, **at), expected, W)


@each_form
@pytest.mark.parametrize("k", [1, 3])
def test_expert_ffn_is_the_ops_it_stands_for(at: dict[str, Any], k: int) -> None:
    ids = torch.randint(-1, 5, (17, k), dtype=torch.int32)
    x, factors = some(17, D, dtype=torch.float64), some(17, k)
    weights = weights_of(4, at, torch.float64, biased=False)
    order, offsets = evaluate(Group, {"ids": ids}, experts=4)
    rows = evaluate_one(Gather, {"x": x, "order": order}, k=k)
    h = evaluate_one(GroupedLinear, {"rows": rows, "offsets": offsets, "w": weights["w_in"]})
    if at["layout"] == "none":
        a = evaluate_one(Act, {"x": h}, **{name: value for name, value in at.items() if name != "layout"})
    else:
        pair = at["layout"] == "pair"
        up = evaluate_one(GroupedLinear, {"rows": rows, "offsets": offsets, "w": weights["w_up"]}) if pair else None
        a = evaluate_one(Glu, {"gate": h, "up": up}, **at)
    y = evaluate_one(GroupedLinear, {"rows": a, "offsets": offsets, "w": weights["w_out"]})
    expected = evaluate_one(Combine, {"rows": y, "order": order, "weights": factors})
    found = evaluate_one(ExpertFfn, {"x": x, "experts": ids, "weights": factors, **weights}, **at)
    check_near(found, matrix(expected), W)


@each_routing
@each_form
def test_expert_glu_gives_zeros_past_the_last_expert(routing: Routing, at: dict[str, Any]) -> None:
    order, offsets = group(routing.ids.tolist(), routing.experts)
    k = routing.ids.shape[1]
    for dtype in (torch.float32, torch.bfloat16):
        x = some(routing.ids.shape[0], D, dtype=dtype)
        weights = weights_of(routing.experts, at, dtype, biased=True)
        names = {"w_in": "w", "b_in": "b", "w_up": "w_up", "b_up": "b_up"}
        operands = {names[name]: tensor for name, tensor in weights.items() if name in names}
        places = {"order": torch.tensor(order, dtype=torch.int32), "offsets": torch.tensor(offsets, dtype=torch.int32)}
        found = evaluate_one(ExpertGlu, {"x": x, **places, **operands}, k=k, **at)
        assert found.dtype == dtype
        expected = [[0.0] * F for _ in order]
        identity = torch.eye(F, dtype=torch.float64).tolist()
        for e in range(routing.experts):
            for r in range(offsets[e], offsets[e + 1]):
                parts = {name: bank[e] for name, bank in _listed(weights).items() if not name.endswith("_out")}
                expected[r] = oracle_rows.ffn(matrix(x)[order[r] // k], at, parts.pop("w_in"), identity, **parts)
        check_near(found, expected, F)
        assert not found[offsets[-1] :].any()


def test_expert_glu_does_not_round_the_product() -> None:
    """256 + 1 is no bf16; rounded before the clamp it would be 256, and the result 0."""
    x = torch.tensor([[256.0, 1.0]], dtype=torch.bfloat16)
    w = torch.tensor([[[1.0, 1.0]]], dtype=torch.bfloat16)
    b = torch.tensor([[-256.0]])
    places = {"order": torch.tensor([0]), "offsets": torch.tensor([0, 1])}
    found = evaluate_one(ExpertGlu, {"x": x, **places, "w": w, "b": b}, k=1, fn="identity", layout="none")
    assert found.item() == 1.0
    gate = torch.tensor([[[1.0, 1.0], [0.0, 1.0]]], dtype=torch.bfloat16)
    found = evaluate_one(ExpertGlu, {"x": x, **places, "w": gate}, k=1, fn="identity", layout="concat", up_shift=2.0)
    # (256 + 1) * 3 = 771 lies between 768 and 772; from the rounded 256 it would be 768.
    assert found.item() == 772.0


@each_float
@each_form
@pytest.mark.parametrize("shape", [(5, D), (0, D), (2, 3, D), (D,)])
def test_dense_ffn(dtype: torch.dtype, at: dict[str, Any], shape: tuple[int, ...]) -> None:
    x = some(*shape, dtype=dtype)
    weights = {name: bank[0] for name, bank in weights_of(1, at, dtype, biased=True).items()}
    found = evaluate_one(DenseFfn, {"x": x, **weights}, **at)
    assert (found.dtype, found.shape) == (dtype, (*shape[:-1], W))
    rows = matrix(x.reshape(-1, D))
    check_near(found.reshape(-1, W), [oracle_rows.ffn(row, at, **_listed(weights)) for row in rows], W)


@each_form
def test_fused_ops_with_int8_weights(at: dict[str, Any]) -> None:
    torch.manual_seed(5)
    ids, factors = torch.randint(0, 3, (8, 2)), some(8, 2)
    x = some(8, D)
    real, given = {}, {}
    for name, bank in weights_of(3, at, torch.float32, biased=True).items():
        if name.startswith("b"):
            real[name] = given[name] = bank
            continue
        given[name] = torch.randint(-127, 128, bank.shape, dtype=torch.int8)
        given["scale" + name[1:]] = scale = some(*bank.shape[:-1]).abs() / 64
        real[name] = given[name].double() * scale.double().unsqueeze(-1)
    found = evaluate_one(ExpertFfn, {"x": x, "experts": ids, "weights": factors, **given}, **at)
    check_near(found, oracle_rows.expert_ffn(matrix(x), ids.tolist(), matrix(factors), at, _listed(real), W), W)
    first = {name: bank[0] for name, bank in given.items()}
    found = evaluate_one(DenseFfn, {"x": x, **first}, **at)
    expected = [oracle_rows.ffn(row, at, **{n: b[0] for n, b in _listed(real).items()}) for row in matrix(x)]
    check_near(found, expected, W)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_bad_token_stays_alone(bad: float) -> None:
    at = {"fn": "silu", "layout": "concat"}
    ids = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 2]])
    for dtype in (torch.float32, torch.bfloat16):
        x, factors = some(4, D, dtype=dtype), some(4, 2)
        weights = weights_of(3, at, dtype, biased=False)
        operands = {"experts": ids, "weights": factors, **weights}
        clean = evaluate_one(ExpertFfn, {"x": x, **operands}, **at)
        x[1, 2] = bad
        found = evaluate_one(ExpertFfn, {"x": x, **operands}, **at)
        assert not found[1].isfinite().any()
        assert same_bits(found[[0, 2, 3]], clean[[0, 2, 3]])


def test_expert_ffn_twice_is_the_same_bit_by_bit() -> None:
    at = {"fn": "silu", "layout": "concat"}
    ids = torch.randint(0, 8, (64, 4))
    for dtype in (torch.float32, torch.bfloat16):
        x, factors = some(64, D, dtype=dtype), some(64, 4)
        weights = weights_of(8, at, dtype, biased=True)
        operands = {"x": x, "experts": ids, "weights": factors, **weights}
        first = evaluate_one(ExpertFfn, operands, **at)
        assert all(same_bits(first, evaluate_one(ExpertFfn, operands, **at)) for _ in range(3))


def test_the_order_of_tokens_does_not_matter() -> None:
    """A token's result has the same digits wherever it stands, up to how products of other sizes are summed."""
    at = {"fn": "silu", "layout": "concat"}
    ids, x, factors = torch.randint(0, 4, (12, 2)), some(12, D, dtype=torch.float64), some(12, 2)
    weights = weights_of(4, at, torch.float64, biased=False)
    found = evaluate_one(ExpertFfn, {"x": x, "experts": ids, "weights": factors, **weights}, **at)
    turn = torch.randperm(12)
    again = evaluate_one(ExpertFfn, {"x": x[turn], "experts": ids[turn], "weights": factors[turn], **weights}, **at)
    check_near(again, matrix(found[turn]), W)
    assert len(listed(again)) == 12 * W
