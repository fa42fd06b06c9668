"""Which of several ways to write a layer is fastest on this CPU: by a model of cost, or measured where that is asked.

T tokens, K experts per token, E experts, D model width, F expert width.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from moec.backendbase import Weights
from moec.backends.onnx.bound import run_bound
from moec.backends.onnx.form import Form
from moec.backends.onnx.lower import region_model
from moec.backends.onnx.runtime import session
from moec.bench import Effort, compare
from moec.environment import machine
from moec.exporter.probes import inputs_of
from moec.exporter.ways import Way, expert_op
from moec.ir import ExpertFfn
from moec.writing import write_text

USUAL = (1, 32, 256)
# Of one thread: bytes of weights a second, and operations (two for each product) in products of floats, of rows in
# int8, and in QMoE's.
BANDWIDTH, EXACT_RATE, ROWS_RATE, QMOE_RATE = 30e9, 175e9, 630e9, 230e9
# Seconds for a product that finds no rows, for any other node that does, and for all that a form does besides.
PRODUCT, NODE, ROWS_FIXED, QMOE_FIXED = 1.6e-6, 5e-7, 6e-5, 1e-4
# Seconds for each number between an expert's products, where experts are put together and taken apart again.
TOGETHER = 1.2e-9


def fastest_first(
    found: Sequence[Way], weights: Weights, tokens: Sequence[int], *, tune: bool
) -> tuple[list[Way], str]:
    """The ways, the fastest over these numbers of tokens first, and how that is known."""
    op = expert_op(found[0].region)
    if len(found) < 2 or op is None:
        return list(found), ""
    counts = tuple(tokens) or USUAL
    if tune:
        times = measured(found, weights, counts)
        how = "measured here"
    else:
        times = {way.title: [estimate(op, way.form, count) for count in counts] for way in found}
        how = "by a model of cost"
    listed = ", ".join(map(str, counts))
    order = sorted(found, key=lambda way: _worth(times, way.title))
    told = "; ".join(f"{way.title} {'/'.join(f'{1e3 * t:.2g}' for t in times[way.title])} ms" for way in order)
    return order, f"{how}, at {listed} tokens: {told}"


def _worth(times: Mapping[str, Sequence[float]], title: str) -> float:
    """The product over token counts of the time over the best time there."""
    best = [min(column) for column in zip(*times.values(), strict=True)]
    return float(prod(mine / least for mine, least in zip(times[title], best, strict=True)))


def estimate(op: ExpertFfn, form: Form, tokens: int) -> float:
    """Seconds of one call in one thread: reading the experts that are hit, the products, and what each node costs."""
    experts, k = op.w_in.type.shape[0].constant or 1, op.experts.type.shape[1].constant or 1
    matrices = (*op.w_in.type.shape[1:], *op.w_out.type.shape[1:])
    rows_in, d, out, f = (size.constant or 0 for size in matrices)
    weights = rows_in * d * (2 if op.layout == "pair" else 1) + out * f
    hit = experts * (1 - (1 - k / experts) ** tokens)
    rows = tokens * k
    exact = form.experts == "sorted" and form.products == "exact"
    reading: float = hit * weights * (32 if exact else form.bits) / 8 / BANDWIDTH
    work = 2.0 * rows * weights
    if form.experts == "qmoe":
        return reading + work / QMOE_RATE + QMOE_FIXED
    products = reading + work / (EXACT_RATE if exact else ROWS_RATE) + ROWS_FIXED
    if form.chained:
        return products + experts * (3 * PRODUCT + (2 if exact else 9) * NODE)
    return products + 2 * experts * PRODUCT + rows * f * TOGETHER


def measured(found: Sequence[Way], weights: Weights, tokens: Sequence[int]) -> dict[str, list[float]]:
    """Seconds of each way at each number of tokens; what was measured before on this machine is not measured again."""
    path = cache_file()
    known = _read(path)
    keys = {(way.title, count): _key(way, count) for way in found for count in tokens}
    if not all(key in known for key in keys.values()):
        runs = {way.title: session(region_model(way.region, weights, form=way.form)) for way in found}
        for count in tokens:
            known |= _measure(found, runs, count, keys)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(known, indent=1, sort_keys=True) + "\n")
    return {way.title: [known[keys[way.title, count]] for count in tokens] for way in found}


def _measure(
    found: Sequence[Way], runs: Mapping[str, Any], count: int, keys: Mapping[tuple[str, int], str]
) -> dict[str, float]:
    """All of them against the first, in turns."""
    given = inputs_of(found[0].region, count)
    named = list(zip((value.name for value in found[0].region.inputs), given, strict=True))
    y = torch.empty_like(given[0])
    out = f"out:{found[0].region.outputs[0].name}"

    def call(title: str) -> Any:
        return lambda: run_bound(runs[title], named, [(out, y)])

    times = {}
    for way in found[1:]:
        first, other = compare(call(found[0].title), call(way.title), Effort(seconds=1.0))
        times[keys[found[0].title, count]] = first.median_ms / 1e3
        times[keys[way.title, count]] = other.median_ms / 1e3
    return times


def _key(way: Way, count: int) -> str:
    op = expert_op(way.region)
    assert op is not None
    sizes = f"E{op.w_in.type.shape[0]}k{op.experts.type.shape[1]} in{op.w_in.type.shape} out{op.w_out.type.shape}"
    return f"{sizes} {op.fn} {op.layout} {op.x.type.dtype}, {way.title}, {count} tokens"


def cache_file() -> Path:
    """Where this machine's results are: under MOEC_CACHE, else the user's cache folder."""
    root = os.environ.get("MOEC_CACHE")
    if root is None:
        root = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "moec")
    slug = re.sub(r"[^a-z0-9]+", "-", machine().lower()).strip("-")
    return Path(root) / "onnx" / f"{slug}-{torch.get_num_threads()}-threads-onnxruntime-{onnxruntime.__version__}.json"


def _read(path: Path) -> dict[str, float]:
    """What the file holds; nothing where it is missing or damaged, and then it is written anew."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: float(value) for key, value in found.items() if isinstance(value, int | float) and value > 0}
