"""Shorthands for the tests of the front end: a case's module compiled, its outputs, what moec said."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import moec
from moec.report import LayerReport, Report
from tests.corpus import CASES
from tests.corpus.case import random_tokens
from tests.frontend.compare import Outcome, call, difference
from tests.frontend.observed import example

# One of each style and kind: what a test runs on that cannot afford the corpus.
FEW = ("loop_list.swiglu", "loop_stacked.gelu", "sorted.relu", "gathered.swiglu", "written.flat_pack", "ffn.swiglu")


def compiled(name: str, **options: Any) -> tuple[Any, Any]:
    """(original, compiled) of a case; its layers did compile."""
    module = CASES[name].make()
    fast = moec.compile(module, example_inputs=example(CASES[name]), **options)
    assert any(layer.status == "compiled" for layer in report_of(fast).layers)
    return module, fast


def report_of(fast: Any) -> Report:
    report = fast.moec.report
    assert isinstance(report, Report)
    return report


def left_alone(report: Report) -> list[LayerReport]:
    return [layer for layer in report.layers if layer.status == "left alone"]


def tokens(name: str, count: int = 33, seed: int = 0) -> tuple[Any, ...]:
    return CASES[name].inputs(random_tokens(count, CASES[name].dim, seed=300 + seed))


def out(module: Callable[..., Any], args: tuple[Any, ...]) -> Outcome:
    with torch.no_grad():
        return call(module, args)


def first(module: Callable[..., Any], args: tuple[Any, ...]) -> Tensor:
    """The first tensor of the result."""
    outcome = out(module, args)
    assert outcome.error == "", outcome.error
    result = outcome.results[0]
    assert isinstance(result, Tensor)
    return result


def agree(module: nn.Module, reference: nn.Module, args: tuple[Any, ...], bar: float = 2e-6) -> None:
    assert difference(out(module, args), out(reference, args), bar) == ""


@contextmanager
def told() -> Iterator[list[str]]:
    """Collects what moec warns about."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    texts += [str(item.message) for item in caught if "MOEC" in str(item.message)]


def refusal(model: nn.Module, example: tuple[Any, ...] | None = None) -> str:
    """Everything moec says about a model of which it must compile nothing."""
    try:
        report = report_of(moec.compile(model, example_inputs=example))
    except moec.MoecError as error:
        return str(error)
    assert not [layer.name for layer in report.layers if layer.status == "compiled"]
    return "\n".join(layer.reason for layer in left_alone(report)) + "\n".join(report.notes)
