"""Weights in a region: read from the user's parameters on each call, whatever their layout, and never stale.

T tokens, K choices, E experts, D model width, F expert width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from moec.backendbase import Executable
from moec.ir import Region, parse
from moec.weights import View
from tests.backends.oracle_numbers import same_bits
from tests.backends.running import Weights, build
from tests.backends.shapes import some

E, D, F = 4, 6, 5
UNFUSED = """\
region moe(%x: f32[T, 6], %experts: i32[T, 2], %weights: f32[T, 2]) {
  %order, %offsets = group(%experts) {experts=4}
  %rows = gather(%x, %order) {k=2}
  %w_gate = weight {ref="gate"} : f32[4, 5, 6]
  %w_up = weight {ref="up"} : f32[4, 5, 6]
  %g = grouped_linear(%rows, %offsets, %w_gate)
  %u = grouped_linear(%rows, %offsets, %w_up)
  %a = glu(%g, %u) {fn="silu"}
  %w_down = weight {ref="down"} : f32[4, 6, 5]
  %rows_2 = grouped_linear(%a, %offsets, %w_down)
  %y = combine(%rows_2, %order, %weights)
  return %y
}"""
JOINED = """\
region moe(%x: f32[T, 6], %experts: i32[T, 2], %weights: f32[T, 2]) {
  %w_gate = weight {ref="gate"} : f32[4, 5, 6]
  %w_up = weight {ref="up"} : f32[4, 5, 6]
  %w_in = concat_weights(%w_gate, %w_up) {axis=1}
  %w_down = weight {ref="down"} : f32[4, 6, 5]
  %y = expert_ffn(%x, %experts, %weights, %w_in, %w_down) {fn="silu", layout="concat"}
  return %y
}"""
JOINED_UNFUSED = """\
region moe(%x: f32[T, 6], %experts: i32[T, 2], %weights: f32[T, 2]) {
  %order, %offsets = group(%experts) {experts=4}
  %rows = gather(%x, %order) {k=2}
  %w_gate = weight {ref="gate"} : f32[4, 5, 6]
  %w_up = weight {ref="up"} : f32[4, 5, 6]
  %w_in = concat_weights(%w_gate, %w_up) {axis=1}
  %h = grouped_linear(%rows, %offsets, %w_in)
  %a = glu(%h) {fn="silu", layout="concat"}
  %w_down = weight {ref="down"} : f32[4, 6, 5]
  %rows_2 = grouped_linear(%a, %offsets, %w_down)
  %y = combine(%rows_2, %order, %weights)
  return %y
}"""
PLACED = """\
region moe(%x: f32[T, 6], %experts: i32[T, 2], %weights: f32[T, 2]) {
  %order, %offsets = group(%experts) {experts=4}
  %rows = gather(%x, %order) {k=2}
  %there, %bounds = exchange(%rows, %offsets) {owners=[1, 0, 1, 0], devices=2}
  %w_gate = weight {ref="gate"} : f32[4, 5, 6]
  %w_up = weight {ref="up"} : f32[4, 5, 6]
  %gate_there = select_experts(%w_gate) {experts=[1, 3, 0, 2]}
  %up_there = select_experts(%w_up) {experts=[1, 3, 0, 2]}
  %g = grouped_linear(%there, %bounds, %gate_there)
  %u = grouped_linear(%there, %bounds, %up_there)
  %a = glu(%g, %u) {fn="silu"}
  %w_down = weight {ref="down"} : f32[4, 6, 5]
  %down_there = select_experts(%w_down) {experts=[1, 3, 0, 2]}
  %rows_2 = grouped_linear(%a, %bounds, %down_there)
  %home, %bounds_home = exchange(%rows_2, %bounds) {owners=[1, 0, 1, 0], devices=2, back=true}
  %y = combine(%home, %order, %weights)
  return %y
}"""
QUANTIZED = """\
region moe(%x: f32[T, 6], %experts: i32[T, 2], %weights: f32[T, 2]) {
  %w_gate = weight {ref="gate"} : f32[4, 5, 6]
  %w_up = weight {ref="up"} : f32[4, 5, 6]
  %w_in = concat_weights(%w_gate, %w_up) {axis=1}
  %q_in, %s_in = quantize_weight(%w_in)
  %w_down = weight {ref="down"} : f32[4, 6, 5]
  %q_out, %s_out = quantize_weight(%w_down)
  %y = expert_ffn(%x, %experts, %weights, %q_in, %q_out, scale_in=%s_in, scale_out=%s_out) {fn="silu", layout="concat"}
  return %y
}"""
REGIONS = {
    "unfused": UNFUSED,
    "joined": JOINED,
    "joined-unfused": JOINED_UNFUSED,
    "placed": PLACED,
    "quantized": QUANTIZED,
}


def _flat(weights: Weights, ref: str, w: torch.Tensor) -> None:
    """All experts in one parameter [E*N, C] behind some other rows."""
    experts, rows, columns = w.shape
    weights.dense(ref, torch.cat([torch.zeros(3, columns, dtype=w.dtype), w.flatten(0, 1)]))
    views = (View(ref, (3 + e * rows) * columns, (rows, columns), (columns, 1)) for e in range(experts))
    weights.views[ref] = tuple(views)


def _interleaved(weights: Weights, ref: str, w: torch.Tensor) -> None:
    """Every other row of one parameter, the experts in reverse."""
    experts, rows, columns = w.shape
    larger = torch.full((experts, 2 * rows, columns), float("nan"), dtype=w.dtype)
    larger[:, ::2] = w.flip(0)
    weights.dense(ref, larger)
    step = 2 * rows * columns
    views = (View(ref, (experts - 1 - e) * step, (rows, columns), (2 * columns, 1)) for e in range(experts))
    weights.views[ref] = tuple(views)


Entry = Callable[[Weights, str, torch.Tensor], object]
LAYOUTS: dict[str, Entry] = {
    "stacked": lambda weights, ref, w: weights.stacked(ref, w),
    "transposed": lambda weights, ref, w: weights.stacked(ref, w.transpose(1, 2).contiguous().transpose(1, 2)),
    "separate": lambda weights, ref, w: weights.separate(ref, w),
    "separate-transposed": lambda weights, ref, w: weights.separate(
        ref, w.transpose(1, 2).contiguous().transpose(1, 2)
    ),
    "flat": _flat,
    "interleaved": _interleaved,
}
each_region = pytest.mark.parametrize("text", REGIONS.values(), ids=REGIONS)
each_pack = pytest.mark.parametrize("pack", [False, True])


def layer(put: Entry = LAYOUTS["stacked"]) -> Weights:
    """gate, up and down of E experts."""
    torch.manual_seed(11)
    weights = Weights()
    for ref, shape in (("gate", (E, F, D)), ("up", (E, F, D)), ("down", (E, D, F))):
        put(weights, ref, some(*shape))
    return weights


def inputs(tokens: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, experts and weights of a call; expert 3 has no token."""
    torch.manual_seed(12)
    return some(tokens, D), torch.randint(0, 3, (tokens, 2), dtype=torch.int32), some(tokens, 2)


def run(executable: Executable, at: tuple[torch.Tensor, ...] | None = None) -> torch.Tensor:
    """The one output."""
    (y,) = executable(*(at or inputs()))
    return y


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to the order of sums."""
    return bool((a - b).norm() <= 2e-6 * b.norm())


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
