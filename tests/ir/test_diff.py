"""Diffs show what changed and not what was renamed."""

from __future__ import annotations

import re

import pytest
from hypothesis import HealthCheck, given, settings

from moec.ir import Region, diff, parse
from tests.ir.build import MOE, moe
from tests.ir.random_regions import regions


def renamed(text: str) -> str:
    """All values under numbers, as a pass that rebuilds everything would leave them."""
    names = list(dict.fromkeys(re.findall(r"%[\w.]+", text)))
    return re.sub(r"%[\w.]+", lambda match: f"%{names.index(match.group()) + 100}", text)


def test_equal_regions() -> None:
    assert diff(moe(), moe()) == ""


def test_renamed_values_do_not_show() -> None:
    assert renamed(MOE) != MOE
    assert diff(moe(), parse(renamed(MOE))) == ""


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(regions())
def test_no_region_differs_from_itself(region: Region) -> None:
    assert diff(region, region) == ""


CHANGED = """\
  ...
    %w_gate_up = weight {ref="gate_up"} : f32[8, 96, 64]
    %h = grouped_linear(%rows, %offsets, %w_gate_up) : f32[2T, 96]
-   %a = glu(%h) {fn="silu", layout="concat"} : f32[2T, 48]
+   %a = glu(%h) {fn="gelu", layout="concat"} : f32[2T, 48]
    %w_down = weight {ref="down"} : f32[8, 64, 48]
    %rows_2 = grouped_linear(%a, %offsets, %w_down) : f32[2T, 64]"""


@pytest.mark.parametrize("rename", [False, True])
def test_a_changed_attribute_is_all_that_shows(rename: bool) -> None:
    text = MOE.replace("silu", "gelu")
    assert diff(moe(), parse(renamed(text) if rename else text)) == CHANGED


def test_fused_ops() -> None:
    after = parse(
        """\
region moe(%x: f32[T, 64], %experts: i32[T, 2], %weights: f32[T, 2]) {
  %w_gate_up = weight {ref="gate_up"} : f32[8, 96, 64]
  %w_down = weight {ref="down"} : f32[8, 64, 48]
  %y = expert_ffn(%x, %experts, %weights, %w_gate_up, %w_down) {fn="silu", layout="concat"} : f32[T, 64]
  return %y
}"""
    )
    assert diff(moe(), after) == (
        """\
  region moe(%x: f32[T, 64], %experts: i32[T, 2], %weights: f32[T, 2]) {
-   %order, %offsets = group(%experts) {experts=8} : i32[2T], i32[9]
-   %rows = gather(%x, %order) {k=2} : f32[2T, 64]
    %w_gate_up = weight {ref="gate_up"} : f32[8, 96, 64]
-   %h = grouped_linear(%rows, %offsets, %w_gate_up) : f32[2T, 96]
-   %a = glu(%h) {fn="silu", layout="concat"} : f32[2T, 48]
    %w_down = weight {ref="down"} : f32[8, 64, 48]
-   %rows_2 = grouped_linear(%a, %offsets, %w_down) : f32[2T, 64]
-   %y = combine(%rows_2, %order, %weights) : f32[T, 64]
+   %y = expert_ffn(%x, %experts, %weights, %w_gate_up, %w_down) {fn="silu", layout="concat"} : f32[T, 64]
    return %y"""
    )


def test_color() -> None:
    text = diff(moe(), parse(MOE.replace("silu", "gelu")), color=True)
    plain = diff(moe(), parse(MOE.replace("silu", "gelu")))
    assert "\x1b[31m- " in text
    assert "\x1b[32m+ " in text
    assert re.sub(r"\x1b\[\d+m", "", text) == plain


def test_a_name_that_now_means_something_else_gets_a_mark() -> None:
    before = parse('region r(%x: f32[T]) {\n  %a = act(%x) {fn="relu"} : f32[T]\n  return %a\n}')
    after = parse(
        'region r(%x: f32[T]) {\n  %b = act(%x) {fn="relu"} : f32[T]\n'
        '  %a = act(%b) {fn="tanh"} : f32[T]\n  return %a\n}'
    )
    assert diff(before, after) == (
        """\
  region r(%x: f32[T]) {
    %a = act(%x) {fn="relu"} : f32[T]
-   return %a
+   %a' = act(%a) {fn="tanh"} : f32[T]
+   return %a'"""
    )


def test_inputs_and_region_names_show() -> None:
    after = parse(MOE.replace("region moe(%x", "region ffn(%tokens: i64[T], %x"))
    assert diff(moe(), after).startswith("- region moe(%x: f32[T, 64], ")
