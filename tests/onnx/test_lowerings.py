"""Every op of the op table in ONNX Runtime against its meaning, over routings that are easy to get wrong.

T tokens, K choices, E experts, D model width, F expert width, W output width, C places of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from moec.backendbase import load_backend
from moec.backends.onnx.table import LOWERINGS
from moec.ir import (
    OPS,
    Act,
    BatchNorm,
    Combine,
    CombineDense,
    DenseFfn,
    Dim,
    DispatchDense,
    Exchange,
    ExpertFfn,
    ExpertGlu,
    Gather,
    Glu,
    Group,
    GroupedLinear,
    IdentityRows,
    KeptWeights,
    Linear,
    Norm,
    Op,
    Pointwise,
    QuantizeRows,
    Route,
    RouteExperts,
    ScaleRows,
)
from moec.ir.formula import UNARY
from moec.ir.ops_activation import FUNCTIONS
from tests.backends.running import DTYPES, FLOATS, Operand, Weights, evaluate, single
from tests.backends.shapes import Routing, each_routing, some
from tests.backends.test_fused import FORMS
from tests.onnx.running import both

D, F, W = 6, 4, 5
POINTWISE = [*(f"{fn}(a)" for fn in UNARY), "9 * tanh(a / 9) * sigmoid(a) * b", "min(max(a, -1), 1) - b"]
each_form = pytest.mark.parametrize("at", FORMS, ids=lambda at: f"{at['fn']}-{at['layout']}")
each_float = pytest.mark.parametrize("dtype", FLOATS)


def compare(cls: type[Op], operands: Mapping[str, Operand], *, bar: float | None = None, **attributes: Any) -> None:
    """One op, all of whose operands are inputs."""
    region, inputs = single(cls, operands, **attributes)
    both(region, inputs, bar=bar)


def test_every_op_has_a_lowering_or_is_the_users_own() -> None:
    assert {name for name, op in OPS.items() if op not in LOWERINGS and not op.of_weights} == {"opaque"}


def banks(experts: tuple[int, ...], at: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights and biases of an FFN, for E experts or for one."""
    rows = F if at["layout"] in ("none", "pair") else 2 * F
    found = {"w_in": some(*experts, rows, D, dtype=dtype), "w_out": some(*experts, W, F, dtype=dtype)}
    found |= {"b_in": some(*experts, rows, dtype=dtype), "b_out": some(*experts, W)}
    if at["layout"] == "pair":
        found |= {"w_up": some(*experts, rows, D, dtype=dtype), "b_up": some(*experts, rows, dtype=dtype)}
    return found


@each_routing
@each_form
def test_expert_ffn(routing: Routing, at: dict[str, Any]) -> None:
    tokens, k = routing.ids.shape
    x, weights = some(tokens, D), some(tokens, k)
    if tokens > 1:
        x[0] = float("nan")
        weights[1] = 0.0
    compare(
        ExpertFfn, {"x": x, "experts": routing.ids, "weights": weights, **banks((routing.experts,), at, x.dtype)}, **at
    )


@each_float
def test_expert_ffn_in_every_type(dtype: str) -> None:
    ids = torch.randint(-1, 6, (33, 3), dtype=torch.int32)
    kind, at = DTYPES[dtype], FORMS[0]
    compare(
        ExpertFfn, {"x": some(33, D, dtype=kind), "experts": ids, "weights": some(33, 3), **banks((5,), at, kind)}, **at
    )


def test_weights_of_slots_without_an_expert_may_be_anything() -> None:
    ids = torch.tensor([[0, -1], [3, 1]], dtype=torch.int32)
    weights = torch.tensor([[0.5, float("nan")], [float("inf"), 0.25]])
    compare(
        ExpertFfn,
        {"x": some(2, D), "experts": ids, "weights": weights, **banks((3,), FORMS[0], torch.float32)},
        **FORMS[0],
    )


@each_float
@each_form
def test_dense_ffn(at: dict[str, Any], dtype: str) -> None:
    if dtype == "f64" and at["fn"] == "gelu":
        pytest.skip("ONNX Runtime has no Erf in f64")
    for shape in ((7, D), (1, D), (0, D), (2, 3, D)):
        compare(DenseFfn, {"x": some(*shape, dtype=DTYPES[dtype]), **banks((), at, DTYPES[dtype])}, **at)


@pytest.mark.parametrize("fn", FUNCTIONS)
def test_activations(fn: str) -> None:
    x = torch.cat([torch.linspace(-30, 30, 61), some(64, scale=3.0)]).reshape(5, 25)
    # sigmoid is off by up to 1e-7 in ONNX Runtime, and silu multiplies it by up to 30.
    bar = 1e-5
    compare(Act, {"x": x}, bar=bar, fn=fn)
    compare(Act, {"x": x}, bar=bar, fn=fn, limit=0.5)
    compare(Act, {"x": x}, bar=bar, fn=fn, limit=0.5, clamp_after=True)
    compare(Glu, {"gate": x, "up": some(5, 25)}, bar=bar, fn=fn, limit=2.0, up_shift=1.0)


@each_routing
def test_rows_to_experts_and_back(routing: Routing) -> None:
    ids = routing.ids
    tokens, k = ids.shape
    compare(Group, {"ids": ids}, experts=routing.experts)
    order, offsets = evaluate(Group, {"ids": ids}, experts=routing.experts)
    rows, weights = some(tokens * k, D), some(tokens, k)
    if tokens:
        compare(Gather, {"x": some(tokens, D), "order": order}, k=k)
        compare(ScaleRows, {"rows": rows, "order": order, "weights": weights})
        for normalize, eps in (("none", 0.0), ("sum", 0.5), ("clamped_sum", 0.25)):
            compare(KeptWeights, {"weights": weights.abs(), "order": order}, normalize=normalize, eps=eps)
        compare(IdentityRows, {"x": some(tokens, D), "ids": ids, "weights": weights}, first=1, count=2)
    compare(Combine, {"rows": rows, "order": order, "weights": weights})
    at = {"offsets": offsets, "w": some(routing.experts, W, D), "b": some(routing.experts, W)}
    compare(GroupedLinear, {"rows": rows, **at})
    owners = tuple(e % 2 for e in range(routing.experts))
    compare(Exchange, {"rows": rows, "offsets": offsets}, owners=owners, devices=2)
    compare(Exchange, {"rows": rows, "offsets": offsets}, owners=owners, devices=2, back=True)
    per_expert = {"w": some(routing.experts, D), "b": some(routing.experts, D)}
    compare(Norm, {"x": rows, "offsets": offsets, **per_expert}, kind="layer", eps=1e-5)
    compare(Norm, {"x": rows, "offsets": offsets, **per_expert}, kind="none", eps=0.0)
    statistics = {"mean": some(routing.experts, D), "var": some(routing.experts, D).square()}
    compare(BatchNorm, {"x": rows, "offsets": offsets, **statistics}, eps=1e-5)
    compare(BatchNorm, {"x": rows, "offsets": offsets, **statistics, **per_expert}, eps=1e-3)


@each_routing
@pytest.mark.parametrize("at", [FORMS[0], FORMS[6]], ids=["concat", "softplus"])
def test_expert_glu(routing: Routing, at: dict[str, Any]) -> None:
    if not routing.ids.numel():
        pytest.skip("no tokens, no places")
    order, offsets = evaluate(Group, {"ids": routing.ids}, experts=routing.experts)
    bank = banks((routing.experts,), at, torch.float32)
    operands = {
        "x": some(len(routing.ids), D),
        "order": order,
        "offsets": offsets,
        "w": bank["w_in"],
        "b": bank["b_in"],
    }
    compare(ExpertGlu, operands, k=routing.ids.shape[1], **at)


@pytest.mark.parametrize("capacity", [1, 2, 5])
@pytest.mark.parametrize("priority", ["token", "choice"])
@pytest.mark.parametrize("policy", ["arrival", "weight", "token_weight"])
def test_capacity(policy: str, priority: str, capacity: int) -> None:
    ids = torch.randint(-1, 4, (23, 2), dtype=torch.int32)
    weights = torch.randint(0, 3, (23, 2)).float()  # with ties
    weights[3, 0] = float("nan")
    given: dict[str, Operand] = {"ids": ids, "weights": None if policy == "arrival" else weights}
    scopes: list[dict[str, Any]] = [{}, {"scope": "sequence", "sequence": Dim.of(7)}]
    for scope in scopes:
        compare(Group, given, experts=3, capacity=Dim.of(capacity), policy=policy, priority=priority, **scope)


ROUTES: list[dict[str, Any]] = [
    {"k": 2},
    {"k": 3, "score": "softmax_chosen"},
    {"k": 2, "score": "sigmoid", "normalize": "sum", "eps": 1e-20, "scale": 2.5},
    {"k": 2, "score": "sqrt_softplus", "normalize": "clamped_sum", "eps": 0.5},
    {"k": 2, "normalize": "norm", "p": 2.0},
    {"k": 3, "score": "sigmoid", "groups": 4, "kept_groups": 2, "group_score": "top2"},
    {"k": 3, "score": "softmax", "groups": 4, "kept_groups": 2, "group_fill": "zero"},
]


@pytest.mark.parametrize("at", ROUTES, ids=str)
def test_route(at: dict[str, Any]) -> None:
    for logits in (some(1, 8), some(40, 8, scale=3.0), torch.zeros(5, 8), torch.randint(0, 2, (30, 8)).float()):
        compare(Route, {"logits": logits, "bias": some(8, scale=0.2)}, **at)
        compare(Route, {"logits": logits, "bias": None}, **at)


def test_expert_choice() -> None:
    for score in ("softmax", "softmax_tokens", "sigmoid", "identity"):
        for capacity in (1, 3, 9):
            compare(RouteExperts, {"logits": some(7, 4)}, capacity=Dim.of(capacity), score=score)
    tokens = torch.tensor([[2, 0, -1], [0, 3, 1]], dtype=torch.int32)
    compare(Group, {"ids": tokens}, experts=2, by="expert")
    at = {"rows": some(6, D), "order": tokens.flatten(), "weights": some(2, 3)}
    compare(Combine, at, by="expert", tokens=Dim.of(5))
    compare(ScaleRows, at, by="expert")


@pytest.mark.parametrize("softmax", [False, True])
def test_soft_moe(softmax: bool) -> None:
    weights = some(5, 3, 2)
    compare(DispatchDense, {"x": some(5, D), "weights": weights}, softmax=softmax)
    compare(CombineDense, {"rows": some(6, D), "weights": weights}, softmax=softmax)


def test_int8() -> None:
    x = some(9, 12)
    for groups in (1, 3):
        compare(QuantizeRows, {"x": x}, groups=groups)
        q, scale = evaluate(QuantizeRows, {"x": x}, groups=groups)
        w = torch.randint(-127, 128, (4, 12), dtype=torch.int8)
        compare(Linear, {"x": q, "w": w, "scale": torch.rand(4), "x_scale": scale, "b": some(4)}, dtype="f32")
    compare(Linear, {"x": x, "w": torch.randint(-127, 128, (4, 12), dtype=torch.int8), "scale": torch.rand(4)})


def test_rows_without_a_number_stay_so_in_int8() -> None:
    x = some(3, 4)
    x[1, 2] = float("nan")
    region, inputs = single(QuantizeRows, {"x": x})
    _, scale = load_backend("onnxruntime").build(region, Weights().store(), {})(*inputs)
    assert scale.isnan().squeeze(1).tolist() == [False, True, False]


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm(kind: str) -> None:
    compare(Norm, {"x": some(7, D), "w": some(D), "b": some(D)}, kind=kind, eps=1e-6, w_shift=1.0)
    compare(Norm, {"x": torch.zeros(3, D)}, kind=kind, eps=1e-6)


@pytest.mark.parametrize("formula", POINTWISE)
def test_pointwise(formula: str) -> None:
    given = {"a": some(7, F, scale=3.0), "b": some(7, F)}
    compare(Pointwise, given if "b" in formula.replace("abs", "") else {"a": given["a"]}, formula=formula)
