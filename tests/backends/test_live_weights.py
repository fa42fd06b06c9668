"""Weights in a region: read from the user's parameters on each call, whatever their layout, and never stale.

T tokens, K choices, E experts, D model width, F expert width.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from moec.ir import Region, parse
from tests.backends.live import (
    JOINED,
    LAYOUTS,
    QUANTIZED,
    REGIONS,
    UNFUSED,
    D,
    E,
    F,
    each_pack,
    each_region,
    inputs,
    layer,
    near,
    run,
)
from tests.backends.oracle_numbers import same_bits
from tests.backends.running import Weights, build
from tests.backends.shapes import some


@each_region
@each_pack
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_weights_gives_the_same(text: str, layout: str, pack: bool) -> None:
    plain = run(build(parse(text), layer()))
    found = run(build(parse(text), layer(LAYOUTS[layout]), pack=pack))
    assert near(found, plain)
    if text != QUANTIZED:
        assert near(found, run(build(parse(UNFUSED), layer())))


@each_region
@each_pack
@pytest.mark.parametrize("layout", ["stacked", "separate", "transposed"])
def test_writes_are_honoured(text: str, layout: str, pack: bool) -> None:
    """In place, by load_state_dict and by a new parameter; the result is that of a fresh build."""
    weights = layer(LAYOUTS[layout])
    executable = build(parse(text), weights, pack=pack)
    run(executable)
    for write in (_write_in_place, _load_state_dict, _replace_parameters):
        before = run(executable)
        write(weights.module)
        after = run(executable)
        assert not near(after, before), write.__name__
        assert same_bits(after, run(build(parse(text), weights, pack=pack))), write.__name__


def _write_in_place(module: nn.Module) -> None:
    for number, param in enumerate(module.parameters()):
        param[0].mul_(2.0 + number) if number % 2 else param.add_(0.25)


def _load_state_dict(module: nn.Module) -> None:
    module.load_state_dict({name: 0.5 - value for name, value in module.state_dict().items()})


def _replace_parameters(module: nn.Module) -> None:
    for name, param in list(module.named_parameters()):
        setattr(module, name, nn.Parameter((param * -1.5).detach(), requires_grad=False))


@each_region
@each_pack
def test_refresh_sees_what_nobody_announces(text: str, pack: bool) -> None:
    weights = layer()
    executable = build(parse(text), weights, pack=pack)
    run(executable)
    for param in weights.module.parameters():
        param.data.mul_(3.0)
    executable.refresh()
    assert same_bits(run(executable), run(build(parse(text), weights, pack=pack)))


@each_region
@each_pack
def test_an_expert_without_tokens_is_not_looked_at(text: str, pack: bool) -> None:
    weights = layer()
    clean = run(build(parse(text), weights, pack=pack))
    for param in weights.module.parameters():
        param[3] = float("nan")
    found = run(build(parse(text), weights, pack=pack))
    assert same_bits(found, clean)


def test_nothing_is_copied_unless_asked_for() -> None:
    """Joined and selected weights stay in the user's parameters; only int8 is a copy without `pack`."""
    for name, text in REGIONS.items():
        executable = build(parse(text), layer())
        run(executable)
        copied = executable.nbytes_packed
        expected = 3 * E * D * F + 4 * (2 * E * F + E * D) if name == "quantized" else 0
        assert copied == expected, f"{name}: {executable.describe()}"


def test_only_hit_experts_are_read() -> None:
    """A layer with every expert in a parameter of its own reads no more of them than the tokens ask for."""
    weights = layer(LAYOUTS["separate"])
    executable = build(parse(UNFUSED), weights)
    run(executable)
    del weights.module._parameters["gate_3"]
    x, _, factors = inputs()
    assert run(executable).isfinite().all()
    with pytest.raises(Exception, match="gate_3"):
        executable(x, torch.full((7, 2), 3, dtype=torch.int32), factors)


@each_region
@each_pack
def test_describe_names_every_op_on_a_line(text: str, pack: bool) -> None:
    region = parse(text)
    lines = build(region, layer(), pack=pack).describe().splitlines()
    for node in region.nodes:
        if node.op.name != "weight":
            assert any(node.op.name in line for line in lines), node.op.name


@each_region
@each_pack
def test_results_carry_no_graph(text: str, pack: bool) -> None:
    weights = layer()
    for param in weights.module.parameters():
        param.requires_grad_(True)
    executable = build(parse(text), weights, pack=pack)
    x, ids, factors = inputs()
    with torch.enable_grad():
        y = run(executable, (x.requires_grad_(), ids, factors))
    assert not y.requires_grad


@each_region
def test_inputs_are_not_written_to(text: str) -> None:
    executable = build(parse(text), layer())
    given = inputs()
    copies = [tensor.clone() for tensor in given]
    run(executable, given)
    assert all(same_bits(a, b) for a, b in zip(given, copies, strict=True))


@each_region
@each_pack
def test_ids_of_both_types_and_any_number_of_tokens(text: str, pack: bool) -> None:
    executable = build(parse(text), layer(), pack=pack)
    for tokens in (0, 1, 2, 33):
        x, ids, factors = inputs(tokens)
        short = run(executable, (x, ids, factors))
        long = run(executable, (x, ids.long(), factors))
        assert short.shape == (tokens, D)
        assert same_bits(short, long)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_weights_joined_along_each_axis(axis: int) -> None:
    """What a region returns of its weights: joined, selected, quantised."""
    weights = Weights()
    a, b = some(3, 4, 5), some(3, 4, 5)
    weights.stacked("a", a).separate("b", b)
    shape = [3, 4, 5]
    shape[axis] *= 2
    text = f"""\
region joined(%rows: f32[R, {shape[2]}], %offsets: i32[{shape[0] + 1}]) {{
  %a = weight {{ref="a"}} : f32[3, 4, 5]
  %b = weight {{ref="b"}} : f32[3, 4, 5]
  %w = concat_weights(%a, %b) {{axis={axis}}}
  %y = grouped_linear(%rows, %offsets, %w)
  return %y
}}"""
    rows = some(2 * shape[0], shape[2])
    offsets = torch.arange(0, 2 * shape[0] + 1, 2, dtype=torch.int32)
    expected = torch.cat([a, b], axis)
    for pack in (False, True):
        (y,) = build(parse(text), weights, pack=pack)(rows, offsets)
        exact = torch.einsum("erc,enc->ern", rows.view(shape[0], 2, -1), expected).flatten(0, 1)
        assert near(y, exact)


def test_a_dense_layer_with_joined_weights() -> None:
    weights = Weights().dense("gate", some(5, 6)).dense("up", some(5, 6)).dense("down", some(6, 5))
    weights.dense("gate_bias", some(5)).dense("up_bias", some(5))
    joined = """\
region ffn(%x: f32[T, 6]) {
  %w_gate = weight {ref="gate"} : f32[5, 6]
  %w_up = weight {ref="up"} : f32[5, 6]
  %w = concat_weights(%w_gate, %w_up) {axis=0}
  %b_gate = weight {ref="gate_bias"} : f32[5]
  %b_up = weight {ref="up_bias"} : f32[5]
  %b = concat_weights(%b_gate, %b_up) {axis=0}
  %w_down = weight {ref="down"} : f32[6, 5]
  %y = dense_ffn(%x, %w, %w_down, b_in=%b) {fn="silu", layout="concat"}
  return %y
}"""
    x = some(3, 6)
    p = weights.params
    gate, up = x @ p["gate"].T + p["gate_bias"], x @ p["up"].T + p["up_bias"]
    exact = (torch.nn.functional.silu(gate) * up) @ p["down"].T
    for pack, text in itertools.product((False, True), (joined, joined.replace("dense_ffn", "dense_ffn"))):
        assert near(run(build(parse(text), weights, pack=pack), (x,)), exact)


def test_the_same_region_twice_over_two_modules() -> None:
    """Executables share nothing."""
    region: Region = parse(JOINED)
    first, second = layer(), layer()
    for param in second.module.parameters():
        param.mul_(2)
    a, b = build(region, first), build(replace(region, name="again"), second)
    assert not near(run(a), run(b))
    assert same_bits(run(a), run(build(region, first)))
