"""Before and after of every pass as text, with what the pass said."""

from __future__ import annotations

import pytest

from moec.ir import Region
from moec.passes import PASSES
from tests.passes.golden import FOLDER, check_golden, golden_text
from tests.passes.layers import CLAMPED, dense_layer, mixtral_layer, shared_expert_layer, untidy_layer

MIXTRAL = mixtral_layer("moe", e=4, k=2, d=8, f=16)
FIXED = mixtral_layer("moe", e=4, k=2, d=8, f=16, t=8)
PAIR = mixtral_layer("moe", e=4, k=2, d=8, f=16, layout="pair", bias=True, **CLAMPED)
PLAIN = mixtral_layer("moe", e=4, k=2, d=8, f=16, layout="none", fn="gelu")
DENSE_PAIR = dense_layer("ffn", d=8, f=16, layout="pair")
DENSE_PLAIN = dense_layer("ffn", d=8, f=16, layout="none", fn="gelu_tanh", bias=True)

CASES: dict[str, tuple[Region, str]] = {
    "canonicalize": (untidy_layer(), "canonicalize"),
    "canonicalize_capacity": (FIXED, "plan-capacity{factor=4.0},canonicalize"),
    "merge_gate_up": (PAIR, "merge-gate-up"),
    "merge_gate_up_dense": (DENSE_PAIR, "merge-gate-up"),
    "merge_gate_up_fused": (PAIR, "fuse-experts,merge-gate-up"),
    "merge_gate_up_int8": (PAIR, "quantize-experts,merge-gate-up"),
    "fuse_experts": (MIXTRAL, "fuse-experts"),
    "fuse_experts_pair": (PAIR, "fuse-experts"),
    "fuse_experts_plain": (PLAIN, "fuse-experts"),
    "fuse_experts_dense": (DENSE_PLAIN, "fuse-experts"),
    "fuse_experts_shared": (shared_expert_layer(), "fuse-experts"),
    "fuse_experts_partial": (PAIR, "plan-capacity{tokens=64},fuse-experts"),
    "fuse_experts_int8": (PAIR, "quantize-experts,fuse-experts"),
    "quantize_experts": (MIXTRAL, "quantize-experts"),
    "quantize_experts_fused": (PAIR, "fuse-experts,quantize-experts"),
    "quantize_experts_dense": (DENSE_PAIR, "quantize-experts"),
    "quantize_experts_shared": (shared_expert_layer(), "quantize-experts"),
    "plan_capacity_batch": (MIXTRAL, "plan-capacity"),
    "plan_capacity_tokens": (MIXTRAL, "plan-capacity{tokens=512,factor=1.5,multiple=8}"),
    "plan_capacity_sequence": (MIXTRAL, "plan-capacity{tokens=64,scope=sequence}"),
    "place_experts": (PAIR, "place-experts{devices=2}"),
    "place_experts_owners": (PLAIN, "place-experts{devices=3,owners=[2,0,0,2]}"),
}


@pytest.mark.parametrize("name", CASES)
def test_text(name: str, update_golden: bool) -> None:
    region, passes = CASES[name]
    check_golden(name, golden_text(region, passes), update=update_golden)


def test_every_pass_has_golden_text() -> None:
    for kind in PASSES:
        assert any(name.startswith(kind.name.replace("-", "_")) for name in CASES), kind.name


def test_no_golden_file_is_left_over() -> None:
    assert {file.stem for file in FOLDER.glob("*")} == set(CASES)
