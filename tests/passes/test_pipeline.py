"""The runner: verification round every pass, logs, order, defaults, the list of passes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest

from moec.errors import MoecError
from moec.ir import Act, Node, Region, Value, diff, parse
from moec.ir.rewrite import Rewriter
from moec.options import Options
from moec.passbase import Pass, PassLog
from moec.passes import PASSES, FuseExperts, PlanCapacity, QuantizeExperts
from moec.pipeline import default_passes, list_passes, parse_passes, print_passes, run
from tests.passes.layers import dense_layer, mixtral_layer

LAYER = mixtral_layer("moe", e=4, k=2, d=8, f=16)
DENSE = dense_layer("ffn", d=8, f=16, layout="none", fn="relu")


@dataclass(frozen=True)
class Custom:
    """Whatever a test needs a pass to do."""

    name: ClassVar[str] = "custom"
    changes_numerics: ClassVar[bool] = False
    change: Callable[[Region, PassLog], Any]

    def __call__(self, region: Region, log: PassLog) -> Region:
        return self.change(region, log)  # type: ignore[no-any-return]


def fails(change: Callable[[Region, PassLog], Any], region: Region = DENSE) -> str:
    with pytest.raises(MoecError) as error:
        run(region, [Custom(change)])
    return str(error.value)


def test_runs_passes_in_order_with_a_log_for_each() -> None:
    after, logs = run(LAYER, "canonicalize,fuse-experts,quantize-experts")
    assert [log.name for log in logs] == ["canonicalize", "fuse-experts", "quantize-experts"]
    assert logs[0].diff == ""
    assert logs[1].diff == diff(LAYER, run(LAYER, "fuse-experts")[0])
    assert "expert_ffn" in logs[1].diff
    assert all(log.seconds > 0 for log in logs)
    assert parse(str(after)) == after


def test_no_passes_change_nothing() -> None:
    assert run(LAYER, []) == (LAYER, ())


def test_the_region_given_is_verified_first() -> None:
    broken = replace(DENSE, outputs=(Value("gone", DENSE.outputs[0].type),))
    with pytest.raises(MoecError) as error:
        run(broken, [])
    assert error.value.code == "MOEC110"


def test_a_pass_that_breaks_the_region_is_named() -> None:
    def drop_first(region: Region, log: PassLog) -> Region:
        return replace(region, nodes=region.nodes[1:])

    assert (
        fails(drop_first)
        == """[MOEC306] custom broke the region ffn: [MOEC110] linear: %w_up is not defined
  at line 2: %h = linear(%x, %w_up) : f32[T, 16]
  hint: this is a defect of the pass; run without it to go on"""
    )


def test_a_pass_that_makes_what_is_no_ir_is_named() -> None:
    def halve(region: Region, log: PassLog) -> Region:
        edit = Rewriter(region)
        edit.replace_op(region.nodes[1], Act(region.inputs[0], fn="relu"))
        return edit.finish()

    assert (
        fails(halve)
        == """[MOEC306] custom broke the region ffn: [MOEC105] linear: the inputs of w must be 8 like the rows of \
f32[T, 8], found 16
  hint: this is a defect of the pass; run without it to go on"""
    )


def test_a_pass_that_changes_a_type_without_its_users_is_named() -> None:
    def widen(region: Region, log: PassLog) -> Region:
        (first, *rest) = region.nodes
        wide = replace(first.results[0], type=first.results[0].type.with_dtype("bf16"))
        return replace(region, nodes=(Node((wide,), first.op), *rest))

    assert fails(widen).startswith(
        "[MOEC306] custom broke the region ffn: [MOEC112] weight: %w_up is declared bf16[16, 8]"
    )


def test_a_pass_that_changes_the_outputs_is_named() -> None:
    def other_output(region: Region, log: PassLog) -> Region:
        return replace(region, outputs=(region.nodes[1].results[0],))

    assert (
        fails(other_output)
        == """[MOEC306] custom changed the region's outputs from f32[T, 8] to f32[T, 16]
  hint: this is a defect of the pass; run without it to go on"""
    )


def test_a_pass_that_changes_the_inputs_is_named() -> None:
    def more_inputs(region: Region, log: PassLog) -> Region:
        return replace(region, inputs=(*region.inputs, Value("more", region.inputs[0].type)))

    assert fails(more_inputs).startswith(
        "[MOEC306] custom changed the region's inputs from f32[T, 8] to f32[T, 8], f32[T, 8]"
    )


def test_a_pass_that_returns_nothing_is_named() -> None:
    assert (
        fails(lambda region, log: None)
        == """[MOEC306] custom returned a NoneType, not a Region
  hint: this is a defect of the pass; run without it to go on"""
    )


def test_a_pass_that_raises_is_named_and_the_cause_is_kept() -> None:
    def divide(region: Region, log: PassLog) -> Region:
        raise ZeroDivisionError("division by zero")

    with pytest.raises(MoecError) as error:
        run(DENSE, [Custom(divide)])
    assert (
        str(error.value)
        == """[MOEC307] custom raised ZeroDivisionError: division by zero
  hint: this is a defect of the pass; run without it to go on"""
    )
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_an_error_for_the_user_keeps_its_code_and_gets_the_name() -> None:
    def refuse(region: Region, log: PassLog) -> Region:
        raise MoecError("MOEC310", "no room", where="%x", hint="make room")

    assert fails(refuse) == "[MOEC310] custom: no room\n  at %x\n  hint: make room"


def test_ctrl_c_is_no_defect_of_a_pass() -> None:
    def interrupt(region: Region, log: PassLog) -> Region:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(DENSE, [Custom(interrupt)])


def test_order_is_checked_before_anything_runs() -> None:
    def never(region: Region, log: PassLog) -> Region:
        raise AssertionError("must not run")

    with pytest.raises(MoecError) as error:
        run(LAYER, [Custom(never), FuseExperts(), PlanCapacity(tokens=64)])
    assert error.value.code == "MOEC308"
    with pytest.raises(MoecError) as error:
        run(LAYER, "canonicalize,fuse-experts,plan-capacity{tokens=64}")
    assert (
        str(error.value)
        == """[MOEC308] plan-capacity must run before fuse-experts
  at canonicalize,fuse-experts,plan-capacity{tokens=64}
  hint: write "plan-capacity{tokens=64},fuse-experts\""""
    )


@pytest.mark.parametrize(
    ("item", "shown"),
    [(FuseExperts, "the class FuseExperts"), (3, "3"), (len, "<built-in function len>"), (Act, "the class Act")],
)
def test_what_is_no_pass_is_refused(item: object, shown: str) -> None:
    with pytest.raises(MoecError) as error:
        run(LAYER, [item])  # type: ignore[list-item]
    assert (
        str(error.value)
        == f"""[MOEC309] {shown} is not a pass
  hint: give an object with name, changes_numerics and __call__(region, log); docs/passes.md shows one"""
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "canonicalize,fuse-experts"),
        ({"pack": True}, "canonicalize,merge-gate-up,fuse-experts"),
        ({"quantize": "int8"}, "canonicalize,quantize-experts,fuse-experts"),
        ({"quantize": "int8", "pack": True}, "canonicalize,quantize-experts,merge-gate-up,fuse-experts"),
        ({"passes": ""}, ""),
        ({"passes": "fuse-experts{partial=false}"}, "fuse-experts{partial=false}"),
        (
            {"passes": ["canonicalize,fuse-experts", PlanCapacity(tokens=8)]},
            "canonicalize,fuse-experts,plan-capacity{tokens=8}",
        ),
        ({"passes": "fuse-experts", "quantize": "int8"}, "fuse-experts,quantize-experts"),
        ({"passes": [QuantizeExperts()], "quantize": "int8"}, "quantize-experts"),
    ],
)
def test_default_passes(options: dict[str, Any], expected: str) -> None:
    assert print_passes(default_passes(Options.make(**options))) == expected


def test_numerics_change_only_when_asked_for() -> None:
    for pack in (False, True):
        assert not any(one.changes_numerics for one in default_passes(Options.make(pack=pack)))


def test_lists_every_pass_with_its_options() -> None:
    listed = {info.name: info for info in list_passes()}
    assert list(listed) == [kind.name for kind in PASSES]
    assert [name for name, info in listed.items() if info.changes_numerics] == ["plan-capacity", "quantize-experts"]
    assert all(info.summary.endswith(".") for info in listed.values())
    capacity = listed["plan-capacity"]
    assert capacity.before == ("fuse-experts",)
    assert [(option.name, option.type_text, option.default) for option in capacity.options] == [
        ("tokens", "int | none", None),
        ("factor", "float", 1.25),
        ("multiple", "int", 16),
        ("scope", '"batch" or "sequence"', "batch"),
    ]
    devices = listed["place-experts"].options[0]
    assert (devices.name, devices.required) == ("devices", True)


def test_every_pass_is_a_pass() -> None:
    given = {"place-experts": {"devices": 2}}
    assert all(isinstance(kind(**given.get(kind.name, {})), Pass) for kind in PASSES)


def test_reading_and_running_passes_loads_no_framework() -> None:
    code = """
import sys
from moec.ir import parse
from moec.pipeline import run
run(parse('region r(%x: f32[T]) {\\n  %y = act(%x) {fn="silu"} : f32[T]\\n  return %y\\n}'), "canonicalize")
assert not {"torch", "numpy", "triton", "onnx"} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_passes_are_read_once_and_stay_what_they_are() -> None:
    passes = parse_passes("canonicalize,fuse-experts")
    assert run(LAYER, passes)[0] == run(LAYER, passes)[0]
