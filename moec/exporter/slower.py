"""Which layers of a file are slower as they would be written: each timed alone, beside its own nodes.

T tokens, K experts per token, E experts, D model width.
"""

from __future__ import annotations

from typing import Any

import torch

from moec.backends.onnx.lower import region_model
from moec.backends.onnx.providers import fast_providers
from moec.backends.onnx.runtime import run as run_session
from moec.backends.onnx.runtime import session
from moec.bench import Effort, compare
from moec.exporter.confirm import DTYPES, part_of
from moec.exporter.placed import Placed
from moec.exporter.settings import Settings
from moec.frontends.onnx.layer import Layer, Run

# A rewritten file or layer may be this much slower than the original at any number of tokens that the user names.
SLOWER = 1.03


def slower_alone(model: Any, layer: Layer, placed: Placed, run: Run, settings: Settings) -> str:
    """At which of the named numbers of tokens the layer would be slower, and by how much; empty at none."""
    threads = torch.get_num_threads()
    where = fast_providers(settings.target)
    part = part_of(model, layer, run, runs_fast={"threads": threads, "spinning": True, "providers": where})
    alone = region_model(placed.region, placed.weights, form=placed.form)
    after = session(alone, threads=threads, spinning=True, providers=where)
    for tokens in settings.tokens:
        count = tokens if part.fits(tokens) else part.tokens
        generator = torch.Generator().manual_seed(tokens)
        x = torch.randn(count, layer.width, generator=generator)
        scores = torch.rand(count, layer.experts, generator=generator).softmax(-1)
        weights, ids = scores.topk(layer.k, -1)
        feed = part.feed(part.given(layer, [x, ids, weights] if layer.form == "slots" else [x, scores]))
        types = [DTYPES[value.type.dtype] for value in placed.region.inputs]
        told = [x, scores.log()] if placed.logits is not None else [x, ids, weights][: len(types)]
        region = [tensor.to(dtype) for tensor, dtype in zip(told, types, strict=True)]
        before_ms, after_ms = (
            found.median_ms
            for found in compare(
                lambda feed=feed: part.runtime.run(None, feed),  # type: ignore[misc]
                lambda region=region: run_session(after, region),  # type: ignore[misc]
                Effort(seconds=settings.seconds),
            )
        )
        if after_ms > SLOWER * before_ms:
            return f"it would be slower: {after_ms:.3g} ms instead of {before_ms:.3g} at {tokens} tokens"
    return ""
