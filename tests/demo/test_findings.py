"""What makes the demo a failure, one reason at a time."""

from dataclasses import replace

import pytest

from moec.benchresult import Timing
from moec.demo.findings import Accuracy, Batch, Findings, Variant
from moec.report import LayerReport, Report

SAME = Accuracy(images=10, right_before=9, right_after=9, changed=0, logit_error=1e-7)


def layer(**changes: object) -> LayerReport:
    good = LayerReport("blocks.0.moe", "moe", "compiled", max_error=1e-7, max_abs_error=1e-7, bar=2e-6)
    for name, value in changes.items():
        setattr(good, name, value)
    return good


def variant(*layers: LayerReport, exact: bool = True, accuracy: Accuracy = SAME) -> Variant:
    return Variant("moec.compile(model)", exact, Report(layers=list(layers)), accuracy)


def test_nothing_wrong() -> None:
    assert variant(layer()).problems() == []


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (layer(max_error=3e-6), "blocks.0.moe: error 3.0e-06 is above the bar 2.0e-06"),
        (layer(max_error=float("nan")), "blocks.0.moe: error nan is above the bar 2.0e-06"),
        (layer(max_error=None), "blocks.0.moe was not verified"),
        (layer(fallbacks=2), "blocks.0.moe: the original forward served 2 of the calls"),
    ],
)
def test_layer_that_fails(wrong: LayerReport, problem: str) -> None:
    assert variant(wrong).problems() == [problem]


def test_layer_left_alone() -> None:
    left = layer(status="left alone", reason="its experts differ", max_error=None)
    assert variant(left).problems() == [
        "blocks.0.moe was left alone: its experts differ",
        "no MoE layer was compiled",
    ]


def test_changed_predictions_are_wrong_only_where_nothing_was_asked_for() -> None:
    changed = replace(SAME, changed=1)
    assert variant(layer(), accuracy=changed).problems() == ["1 of 10 predictions changed"]
    assert variant(layer(), accuracy=changed, exact=False).problems() == []


def test_findings_name_the_variant_of_each_problem() -> None:
    found = Findings("model", 1, "machine", "CPU", 1, {}, [variant(layer()), variant(layer(fallbacks=1))])
    assert found.problems() == ["moec.compile(model): blocks.0.moe: the original forward served 1 of the calls"]
    assert found.to_dict()["ok"] is False


def test_speedup_is_of_medians() -> None:
    batch = Batch(1, 16, Timing(3.0, 1.0, 9.0, 5), Timing(1.5, 1.0, 9.0, 5))
    assert batch.speedup == 2.0
    judged = variant(layer())
    judged.latency = [batch]
    assert judged.to_dict()["latency"][0]["speedup"] == 2.0
