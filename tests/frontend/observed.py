"""Compile one case of the corpus once and write down every fact the tests ask about.

T tokens, D model width.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import moec
from moec.report import Report
from tests.corpus import CASES, Case
from tests.corpus.case import random_tokens
from tests.frontend.compare import Outcome, call, difference, state, state_difference

TOKENS = (1, 2, 3, 5, 7, 33, 130, 300)
SCALES = (0.05, 1.0, 8.0, 60.0)


@dataclass
class Facts:
    """What was seen. Texts are empty when all is well."""

    report: Report | None = None
    error: str = ""
    untouched: str = ""
    random_state: str = ""
    outputs: list[str] = field(default_factory=list)
    repeated: str = ""
    effects: str = ""
    outside: str = ""
    original: str = ""
    shared: str = ""
    seconds: float = 0.0


def inputs(case: Case, *, full: bool = True) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Labelled arguments that compile has never seen."""
    for count in TOKENS:
        for scale in SCALES if full else (1.0,):
            tokens = random_tokens(count, case.dim, scale=scale, seed=100 + count)
            yield f"T={count} scale={scale}", case.inputs(tokens)
    if full and case.long:
        yield "T=3000 scale=1.0", case.inputs(random_tokens(3000, case.dim, seed=4))
    for name, tokens in special_tokens(case.dim):
        yield name, case.inputs(tokens)
    x, *rest = case.inputs(random_tokens(24, case.dim, seed=5))
    strided = torch.stack([x, x * 2], -1)[..., 0]
    assert not strided.is_contiguous()
    yield "strided", (strided, *rest)


def special_tokens(dim: int) -> Iterator[tuple[str, Tensor]]:
    yield "zeros", torch.zeros(9, dim)
    yield "one zero token", torch.zeros(1, dim)
    yield "repeated", random_tokens(1, dim, seed=6).repeat(21, 1)
    yield "tied", random_tokens(33, dim, seed=7).sign() * 2
    yield "one-hot", torch.eye(dim) * 3
    mixed = random_tokens(35, dim, seed=8)
    yield "mixed scales", mixed * torch.logspace(-2, 1.8, 35)[:, None]
    yield "one kind of token", random_tokens(1, dim, seed=9) + 1e-3 * random_tokens(40, dim, seed=10)
    nan = random_tokens(33, dim, seed=11)
    nan[4] = float("nan")
    yield "a NaN token", nan
    yield "only NaN", torch.full((1, dim), float("nan"))


def example(case: Case) -> tuple[Any, ...]:
    return case.inputs(random_tokens(12, case.dim, seed=77))


@cache
def facts(name: str, with_inputs: bool) -> Facts:
    case, seen = CASES[name], Facts()
    original, reference = case.make(), case.make()
    before, generator = state(original), torch.get_rng_state()
    started = time.perf_counter()
    try:
        compiled = moec.compile(original, example_inputs=example(case) if with_inputs else None)
    except moec.MoecError as error:
        seen.error = str(error)
    seen.seconds = time.perf_counter() - started
    seen.untouched = state_difference(state(original), before, exact=True)
    seen.random_state = "" if torch.equal(generator, torch.get_rng_state()) else "compile moved the random generator"
    if seen.error:
        return seen
    seen.report = compiled.moec.report
    assert isinstance(seen.report, Report)
    seen.shared = shared(original, compiled)
    run_side_by_side(case, compiled, reference, seen, full=not with_inputs)
    if not case.stateful:
        seen.original = same(case, original, case.make(), "the original afterwards")
    if case.perturb is not None:
        case.perturb(compiled if case.perturb_twin else original)
        case.perturb(reference)
        seen.outputs += [text for text in [same(case, compiled, reference, "after new weights", bar=case.bar)] if text]
    return seen


def run_side_by_side(case: Case, compiled: nn.Module, reference: nn.Module, seen: Facts, *, full: bool) -> None:
    twice: list[Outcome] = []
    compiled_outside = reference_outside = 0
    for label, args in inputs(case, full=full):
        for mode in (torch.no_grad, torch.inference_mode) if label == "T=7 scale=1.0" else (torch.no_grad,):
            with mode():
                want, grew = counted(case, reference, args)
                reference_outside += grew
                got, grew = counted(case, compiled, args)
                compiled_outside += grew
                if label == "T=33 scale=1.0":
                    call(reference, args)
                    twice = [got, call(compiled, args)]
            text = difference(got, want, case.bar)
            if text:
                seen.outputs.append(f"{label}: {text}")
    want, got = (call(module, case.inputs(random_tokens(10, case.dim, seed=44))) for module in (reference, compiled))
    text = difference(got, want, case.bar)
    if text:
        seen.outputs.append(f"with gradients enabled: {text}")
    if not case.stateful:
        seen.repeated = difference(twice[1], twice[0], bar=0.0)
    seen.effects = state_difference(state(compiled), state(reference), exact=False)
    if compiled_outside != reference_outside:
        seen.outside = f"{compiled_outside} effects outside the module, the original had {reference_outside}"


def counted(case: Case, module: nn.Module, args: tuple[Any, ...]) -> tuple[Outcome, int]:
    """The outcome, and by how much the effect outside of the module grew."""
    before = len(case.outside()) if case.outside else 0
    outcome = call(module, args)
    return outcome, (len(case.outside()) if case.outside else 0) - before


def same(case: Case, module: nn.Module, reference: nn.Module, what: str, bar: float = 0.0) -> str:
    for count in (1, 33):
        args = case.inputs(random_tokens(count, case.dim, seed=200 + count))
        with torch.no_grad() if count == 1 else nullcontext():
            text = difference(call(module, args), call(reference, args), bar)
        if text:
            return f"{what}, T={count}: {text}"
    return ""


def shared(original: nn.Module, compiled: nn.Module) -> str:
    """The twin has the original's class, keys and tensors, and is another object."""
    if compiled is original:
        return "compile returned the original itself"
    if type(compiled) is not type(original):
        return f"class {type(compiled).__name__} instead of {type(original).__name__}"
    if list(compiled.state_dict()) != list(original.state_dict()):
        return "other state_dict keys"
    for kind in ("named_parameters", "named_buffers"):
        both = (getattr(module, kind)(remove_duplicate=False) for module in (original, compiled))
        for (name, mine), (_, theirs) in zip(*both, strict=True):
            if mine is not theirs:
                return f"{name} is another object"
    return ""
