"""`moec demo`: compile the digits MoE on this machine; show the IR, the check, the accuracy and the latencies.

B images, T = 16 B tokens (each image is 16 patches), K experts per token.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moec import api, bench
from moec.demo import show
from moec.demo.data import Digits, load_held_out, load_model
from moec.demo.findings import Accuracy, Batch, Findings, Variant
from moec.demo.model import DigitsMoE, MoE
from moec.demo.screen import Screen, open_screen
from moec.environment import machine, versions
from moec.errors import MoecError
from moec.jsontext import dumps
from moec.options import Options
from moec.progress import progress

BATCH_SIZES = (1, 8, 64, 256)
DONE, FAILED = 0, 3
TOKENS_PER_IMAGE = 16


def run(
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    pack: bool = False,
    quantize: str | None = None,
    threads: int | None = None,
    json: bool = False,
    seconds: float = 1.0,
) -> int:
    """Run the demo and print it; 0, or 3 if a layer fails its check or a prediction changes that must not.

    pack and quantize are moec.compile's; with quantize the model is compiled a second time. seconds is how long each
    pair of latencies is measured.
    """
    _check(batch_sizes, threads)
    Options.make(pack=pack, quantize=quantize)  # so that a wrong value is told before anything is shown
    screen = None if json else open_screen()
    with _threads(threads):
        found = demonstrate(screen, batch_sizes=batch_sizes, pack=pack, quantize=quantize, seconds=seconds)
    if json:
        print(dumps(found.to_dict()))
    return FAILED if found.problems() else DONE


def demonstrate(
    screen: Screen | None, *, batch_sizes: Sequence[int], pack: bool, quantize: str | None, seconds: float
) -> Findings:
    """Do it all, showing each finding as soon as it is there."""
    started = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, digits = load_model().to(device), load_held_out().to(device)
    found = _describe(model, device)
    if screen:
        show.model(screen, found)
        _show_digit(screen, model, digits)
    packed: dict[str, Any] = {"pack": True} if pack else {}
    for asked in [packed, {"quantize": quantize, **packed}] if quantize else [packed]:
        compiled, variant = compile_variant(model, digits, asked)
        found.variants.append(variant)
        if screen:
            show.compilation(screen, variant)
            if variant.first_moe:
                show.program(screen, variant.first_moe, lifted=variant.exact)
            show.accuracy(screen, variant.accuracy, exact=variant.exact)
        variant.latency = measure(model, compiled, digits, batch_sizes, bench.Effort(seconds=seconds))
        if screen:
            show.latency(screen, variant.latency, f"{found.where}, f32")
    found.seconds = time.perf_counter() - started
    if screen:
        show.verdict(screen, found)
    return found


def compile_variant(model: nn.Module, digits: Digits, asked: dict[str, Any]) -> tuple[nn.Module, Variant]:
    """The model compiled with the options asked for, and what is known before any timing."""
    compiled = api.compile(model, example_inputs=(digits.images[:16],), **asked)
    arguments = ", ".join(["model", *(f"{name}={value!r}" for name, value in asked.items())])
    variant = Variant(
        call=f"moec.compile({arguments})",
        exact="quantize" not in asked,
        report=compiled.moec.report,
        accuracy=judge(model, compiled, digits),
    )
    return compiled, variant


@torch.no_grad()
def judge(before: nn.Module, after: nn.Module, digits: Digits) -> Accuracy:
    """Both models on all held-out digits."""
    old, new = before(digits.images), after(digits.images)
    predicted_old, predicted_new = old.argmax(dim=-1), new.argmax(dim=-1)
    return Accuracy(
        images=digits.num_images,
        right_before=int((predicted_old == digits.labels).sum()),
        right_after=int((predicted_new == digits.labels).sum()),
        changed=int((predicted_old != predicted_new).sum()),
        logit_error=float((new - old).norm() / old.norm()),
    )


@torch.no_grad()
def measure(
    before: nn.Module, after: nn.Module, digits: Digits, batch_sizes: Sequence[int], effort: bench.Effort
) -> list[Batch]:
    """Latency of both on batches of held-out digits, repeated where there are not enough."""
    found = []
    with progress("latency", len(batch_sizes)) as shown:
        for size in batch_sizes:
            shown.step(f"{size} images")
            images = digits.images[torch.arange(size, device=digits.images.device) % digits.num_images]
            old, new = bench.compare(partial(before, images), partial(after, images), effort)
            found.append(Batch(size, size * TOKENS_PER_IMAGE, old, new))
    return found


def _describe(model: DigitsMoE, device: torch.device) -> Findings:
    moe = _first_moe(model)
    return Findings(
        model=f"{type(model).__name__}: a vision transformer trained on handwritten digits, whose {len(model.blocks)} "
        f"FFNs are MoE layers of {moe.num_experts} experts, {moe.top_k} per token",
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        machine=machine(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        threads=torch.get_num_threads(),
        versions=versions(),
    )


@torch.no_grad()
def _show_digit(screen: Screen, model: DigitsMoE, digits: Digits) -> None:
    """The last held-out digit, with the experts that the first MoE layer's router chooses for each patch."""
    scores: list[Tensor] = []
    moe = _first_moe(model)
    hook = moe.router.register_forward_hook(lambda _module, _inputs, output: scores.append(output))
    try:
        model(digits.images[-1:])
    finally:
        hook.remove()
    experts = scores[0].topk(moe.top_k, dim=-1).indices
    show.digit(screen, digits.images[-1].tolist(), int(digits.labels[-1]), "blocks.0.moe", experts.tolist())


def _first_moe(model: DigitsMoE) -> MoE:
    return next(module for module in model.modules() if isinstance(module, MoE))


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    """Torch's threads for the time of the demo."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check(batch_sizes: Sequence[int], threads: int | None) -> None:
    if not batch_sizes or any(type(size) is not int or size < 1 for size in batch_sizes):
        hint = "for example 1,8,64,256"
        raise MoecError("MOEC502", f"batch_sizes={list(batch_sizes)} must be positive whole numbers", hint=hint)
    if threads is not None and threads < 1:
        raise MoecError("MOEC502", f"threads={threads} must be at least 1", hint="leave it out for torch's own choice")
