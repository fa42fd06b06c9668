"""The benchmark: fair turns, rows per layer and for the model, inputs of the right size, a table, JSON and a page."""

from __future__ import annotations

import functools
import json
import re
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn

from moec.bench import Bench, Call, Effort, capture, compare, like_layers, measure_report, resize, timing
from moec.benchinputs import guess_inputs
from moec.benchpage import page, plot, ticks
from moec.benchresult import BenchResult, Row, Timing
from moec.errors import MoecError
from moec.report import LayerReport, Report

QUICK = Effort(seconds=0.0, min_runs=3, warmup=1)


class Block(nn.Module):
    def __init__(self, delay: float) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.delay = delay
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(x.shape[:-1].numel())
        time.sleep(self.delay)
        y: Tensor = self.linear(x)
        return y


class Model(nn.Module):
    """x[B, S, D] -> x[B, S, D] through three blocks, of which the last is never called."""

    def __init__(self, delay: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(delay), Block(delay), Block(delay)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in list(self.layers)[:2]:
            x = layer(x).relu_()  # written in place: what was captured must not change with it
        return x


def compiled(name: str, program: str = "") -> LayerReport:
    return LayerReport(name=name, kind="ffn", status="compiled", ir_after=program.format(name=name))


def make_inputs(tokens: int) -> tuple[Tensor]:
    return (torch.ones(1, tokens, 4),)


def test_compare_takes_turns() -> None:
    order: list[str] = []
    pair = compare(lambda: order.append("b"), lambda: order.append("a"), Effort(seconds=0, min_runs=4, warmup=1))
    assert "".join(order) == "ba" + "baab" * 2
    assert [side.runs for side in pair] == [4, 4]


def test_compare_stops_at_max_runs_or_when_time_is_up() -> None:
    fast = compare(lambda: None, lambda: None, Effort(seconds=60, min_runs=1, max_runs=7, warmup=0))
    assert fast[0].runs == 7
    start = time.perf_counter()
    slow = compare(lambda: time.sleep(0.01), lambda: None, Effort(seconds=0.1, min_runs=1, max_runs=1000, warmup=0))
    assert 1 <= slow[0].runs <= 11
    assert time.perf_counter() - start < 2


def test_timing_is_median_and_percentiles() -> None:
    assert timing([5.0, 1.0, 9.0]) == Timing(5.0, 1.0, 9.0, 3)
    assert timing([float(i) for i in range(101)]) == Timing(50.0, 10.0, 90.0, 101)


def test_rows_for_layers_and_model_tell_fast_from_slow() -> None:
    slow, fast = Model(0.004), Model(0.0)
    report = Report(layers=[compiled("layers.0"), compiled("layers.1")])
    result = Bench(slow, fast, report, make_inputs, effort=QUICK).run([2, 8])
    assert [(row.name, row.tokens) for row in result.rows] == [
        ("layers.0", 2),
        ("layers.0", 8),
        ("layers.1", 2),
        ("layers.1", 8),
        ("whole model", 2),
        ("whole model", 8),
    ]
    assert all(row.speedup > 2 and row.before.median_ms >= 4 for row in result.rows)
    blocks = [module for module in fast.layers if isinstance(module, Block)]
    assert set(blocks[0].rows) == {2, 8}
    assert result.settings["threads"] == torch.get_num_threads()
    assert not result.notes


def test_layers_that_run_the_same_program_are_timed_once() -> None:
    report = Report(layers=[compiled(name, "region {name}: same") for name in ("layers.0", "layers.1")])
    assert [[layer.name for layer in group] for group in like_layers(report)] == [["layers.0", "layers.1"]]
    assert len(like_layers(report, every=True)) == 2
    result = Bench(Model(0), Model(0), report, make_inputs, effort=QUICK).run([2])
    assert [row.title for row in result.rows] == ["layers.0 (and 1 like it)", "whole model"]
    result.fill(report)
    assert report.layers[1].latency == report.layers[0].latency
    assert report.layers[1].latency[0]["measured_on"] == "layers.0"
    assert [row["tokens"] for row in report.latency] == [2]
    assert "layers.1" in str(report)


def test_rows_go_to_the_layer_of_their_kind() -> None:
    moe, ffn = LayerReport("layers.0", "moe", "compiled"), LayerReport("layers.0", "ffn", "left alone")
    report = Report(layers=[moe, ffn])
    Bench(Model(0), Model(0), report, make_inputs, effort=QUICK).run([2]).fill(report)
    assert [row["tokens"] for row in moe.latency] == [2]
    assert ffn.latency == []


def test_a_layer_the_model_does_not_call_is_named() -> None:
    report = Report(layers=[compiled("layers.0"), compiled("layers.2")])
    result = Bench(Model(0), Model(0), report, make_inputs, effort=QUICK).run([2])
    assert result.notes == ["layers.2: not timed, the model did not call it on these inputs"]
    assert {row.name for row in result.rows} == {"layers.0", "whole model"}


def test_calls_that_fell_back_are_named() -> None:
    report = Report(layers=[compiled("layers.0")])

    class FallsBack(Model):
        def forward(self, x: Tensor) -> Tensor:
            report.layers[0].fallbacks += 1
            y: Tensor = super().forward(x)
            return y

    result = Bench(Model(0), FallsBack(0), report, make_inputs, effort=QUICK).run([2])
    assert result.notes == ["layers.0: 4 timed calls fell back to the original forward"]


def test_example_inputs_alone_time_layers_at_every_size_and_the_model_at_its_own() -> None:
    report = Report(layers=[compiled("layers.0")])
    result = Bench(Model(0), Model(0), report, example_inputs={"x": torch.ones(2, 3, 4)}, effort=QUICK).run([1, 8])
    assert [(row.name, row.tokens) for row in result.rows] == [("layers.0", 1), ("layers.0", 8), ("whole model", 6)]


def test_without_inputs_it_says_what_to_pass() -> None:
    with pytest.raises(MoecError, match=r"MOEC605.*Model") as caught:
        Bench(Model(0), Model(0), Report(layers=[compiled("layers.0")])).run([1])
    assert caught.value.hint is not None
    assert "make_inputs" in caught.value.hint


REGION = """region a(%x: f32[T, {width}]) {{
  %y = act(%x) {{fn="silu"}}
  return %y
}}"""


class Flat(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        rows, _ = x.shape  # takes x[T, D] and nothing else
        assert rows
        return super().forward(x)


@pytest.mark.parametrize(
    ("model", "widths", "shape"),
    [(Block(0), [4], (1, 3, 4)), (Block(0), [9, 4], (1, 3, 4)), (Flat(4, 4), [4], (3, 4)), (Block(0), [9], None)],
)
def test_inputs_are_guessed_from_the_widths_of_layers(
    model: nn.Module, widths: list[int], shape: tuple[int, ...] | None
) -> None:
    layers = [compiled("not read"), *(compiled(f"layers.{width}") for width in widths)]
    for layer, width in zip(layers[1:], widths, strict=True):
        layer.ir_before = REGION.format(width=width)
    make = guess_inputs(model, Report(layers=layers))
    assert (make is None) == (shape is None)
    if make is not None:
        (x,) = make(3)
        assert isinstance(x, Tensor)
        assert (x.shape, x.dtype) == (shape, torch.float32)


def test_measure_report_fills_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report(layers=[compiled("layers.0")])
    monkeypatch.setattr(Effort, "__init__", functools.partialmethod(Effort.__init__, seconds=0.0))
    measure_report(Model(0), Model(0), report, [1, 4], (torch.ones(1, 2, 4),))
    assert [row["tokens"] for row in report.layers[0].latency] == [1, 4]
    assert [row["tokens"] for row in report.latency] == [2]


def test_measure_report_without_inputs_says_what_to_pass() -> None:
    with pytest.raises(MoecError, match="MOEC605"):
        measure_report(Model(0), Model(0), Report(layers=[compiled("layers.0")]), [1])


def test_a_layer_that_is_the_model_has_no_second_row_for_the_model() -> None:
    report = Report(layers=[compiled("")])
    result = Bench(Block(0), Block(0), report, make_inputs, effort=QUICK).run([2])
    assert [row.title for row in result.rows] == ["the model"]
    result.fill(report)
    assert report.layers[0].latency
    assert not report.latency


def test_capture_keeps_the_first_input_and_leaves_no_hook() -> None:
    model = Model(0)
    calls = capture(model, ["layers.0", "layers.1", "layers.2"], (torch.full((1, 2, 4), -1.0),))
    assert set(calls) == {"layers.0", "layers.1"}
    assert torch.equal(calls["layers.0"].args[0], torch.full((1, 2, 4), -1.0))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_capture_leaves_no_hook_when_the_model_raises() -> None:
    model = Model(0)
    with pytest.raises(RuntimeError):
        capture(model, ["layers.0"], (torch.ones(1, 2, 5),))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_resize_repeats_and_cuts_all_rows_alike() -> None:
    x, experts, weights = torch.arange(6.0).reshape(3, 2), torch.arange(3).reshape(3, 1), torch.ones(3, 4)
    more = resize(Call((x, experts), {"weights": weights, "flag": True}), 5)
    assert isinstance(more, Call)
    assert more.args[0].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3]]
    assert more.args[1].tolist() == [[0], [1], [2], [0], [1]]
    assert more.kwargs["weights"].shape == (5, 4)
    assert more.kwargs["flag"] is True
    fewer = resize(Call((x.reshape(1, 3, 2), torch.arange(3).reshape(1, 3)), {}), 1)
    assert isinstance(fewer, Call)
    assert [tuple(arg.shape) for arg in fewer.args] == [(1, 1, 2), (1, 1)]


@pytest.mark.parametrize("args", [(torch.ones(3),), (torch.ones(1, 2, 3, 4),), (3,), (torch.ones(0, 4),)])
def test_resize_gives_a_reason_for_what_it_cannot_size(args: tuple[object, ...]) -> None:
    assert isinstance(resize(Call(args, {}), 2), str)


def result_of(*rows: Row) -> BenchResult:
    return BenchResult(list(rows), "a <machine>", {"torch": "2.13.0"}, {"model": "M"}, ["a <note>"])


def row(name: str, tokens: int, before: float, after: float) -> Row:
    return Row(
        name, "moe", tokens, Timing(before, before * 0.9, before * 1.1, 9), Timing(after, after * 0.9, after * 1.2, 9)
    )


def test_table_and_json_agree() -> None:
    result = result_of(row("layers.0", 8, 4.0, 2.0))
    text = str(result)
    assert re.search(r"layers\.0 +8 +4\.00 \[3\.60\.\.4\.40\] +2\.00 \[1\.80\.\.2\.40\] +2\.00x", text)
    assert "a <machine>" in text
    assert "note: a <note>" in text
    read = json.loads(result.to_json())
    assert read["rows"][0]["speedup"] == 2.0
    assert read["rows"][0]["before"] == {"median_ms": 4.0, "p10_ms": 3.6, "p90_ms": 4.4, "runs": 9}
    assert read["versions"] == {"torch": "2.13.0"}


def test_page_is_whole_escaped_and_asks_for_nothing() -> None:
    rows = [row("layers.<0>", tokens, tokens * 1.0, tokens * 0.5) for tokens in (1, 8, 64)] + [row("b", 1, 2.0, 1.0)]
    report = Report(layers=[compiled("layers.<0>"), LayerReport("x", "moe", "left alone", "a <reason>")])
    text = page(result_of(*rows), report)
    assert text.startswith("<!doctype html>")
    assert text.count("<svg") == 2
    assert "1 of 2 layers compiled" in text
    for word in ("layers.<0>", "a <machine>", "a <note>", "a <reason>"):
        assert word not in text
        assert word.replace("<", "&lt;").replace(">", "&gt;") in text
    assert not re.search(r"(src|href|url\()|<script|https?:", text)


def test_plot_has_a_dot_for_each_median_inside_the_picture() -> None:
    root = ElementTree.fromstring(plot([row("a", tokens, 3.0 * tokens, 1.0 * tokens) for tokens in (1, 8, 64, 512)]))
    dots = {name: [d for d in root.iter("circle") if d.get("class") == f"dot {name}"] for name in ("before", "after")}
    assert [len(found) for found in dots.values()] == [4, 4]
    for before, after in zip(dots["before"], dots["after"], strict=True):
        assert before.get("cx") == after.get("cx")
        assert 0 < float(before.get("cy", "nan")) < float(after.get("cy", "nan")) < 300  # slower is higher up
    assert next(d.findtext("title") for d in dots["after"]) == "after, T=1: 1.00 [0.900..1.20] ms"


def test_plot_of_one_point() -> None:
    root = ElementTree.fromstring(plot([row("a", 8, 1.0, 1.0)]))
    labels = [float(text.get("y", "nan")) for text in root.iter("text") if text.text in ("before", "after")]
    assert abs(labels[0] - labels[1]) >= 14  # equal medians, yet the labels do not cover each other


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.9, 11, [1, 2, 5, 10]),
        (0.09, 1200, [0.1, 1, 10, 100, 1000]),
        (3.0, 4.0, [3.0, 4.0]),
        (0.019, 0.06, [0.02, 0.05]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == expected


def test_page_can_be_written(tmp_path: Path) -> None:
    from moec.writing import write_text

    write_text(tmp_path / "out.html", page(result_of(row("a", 1, 1.0, 0.5)), Report()))
    assert [path.name for path in tmp_path.iterdir()] == ["out.html"]
