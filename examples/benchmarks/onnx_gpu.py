"""ONNX Runtime's CUDA provider: which of its MoE ops are right here, and what moec writes beside nodes built by hand.

Five parts: the cases of `moec doctor`; layers of several routers and activations as moec writes them against a plain
evaluation; one layer as moec writes it (its softmax router left to the node, or in plain ops with logarithms of its
weights) beside MoE and QMoE nodes built by hand and beside the portable form; a small Mixtral exported by torch and by
moec; the same compiled.

    python examples/benchmarks/onnx_gpu.py [--layers E8k2D4096F14336 ...] [--tokens 1 32 256 1024] [--json FILE]
                                           [--skip doctor parity layers model compile] [--seconds 0.4]

Needs `moec[onnx-gpu]`, a GPU, and transformers for the last parts. T tokens, K experts per token, E experts, D model
width, F expert width.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from gpu_contestants import Layer, Shape, store
from onnx_gpu_models import compiled, interleaved, model

from moec.backends.onnx.bound import run_bound
from moec.backends.onnx.emitter import DTYPES, OPSET, Emitter
from moec.backends.onnx.form import EXACT, Form
from moec.backends.onnx.lower import region_model
from moec.backends.onnx.own_moe import DOMAIN
from moec.backends.onnx.providers import CPU, CUDA, check_installed, why_no_cuda
from moec.backends.onnx.runtime import session
from moec.backends.onnx.stacks import rounded_in_blocks, stacked
from moec.environment import machine, versions
from moec.exporter.check import check_region
from moec.exporter.placed import with_router
from moec.ir import Builder, ExpertFfn, Region, Route, Tensor, Weight
from moec.jsontext import dumps
from moec.table import table

LAYERS = ("E8k2D1024F3584", "E64k8D1024F512", "E8k2D4096F14336")
PARTS = ("doctor", "parity", "layers", "model", "compile")
KINDS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "silu": {"fn": "silu", "layout": "concat"},
    "gpt-oss": {"fn": "silu", "layout": "interleaved", "alpha": 1.702, "limit": 7.0, "up_shift": 1.0},
    "relu": {"fn": "relu", "layout": "none"},
}
QMOE = {bits: Form(experts="qmoe", bits=bits, block=64 if bits == 4 else 128, cuda=True) for bits in (8, 4)}


def region(shape: Shape, dtype: str, *, routed: bool, **at: Any) -> Region:
    """The experts alone, over ids and weights; or with a softmax router in front of them, over logits."""
    b = Builder("layer")
    x = b.input("x", Tensor.of(dtype, "T", shape.d))
    if routed:
        logits = b.input("logits", Tensor.of(dtype, "T", shape.experts))
        weights, ids = b.add_many(Route(logits, k=shape.k, score="softmax", normalize="sum"), ["weights", "ids"])
    else:
        ids = b.input("ids", Tensor.of("i32", "T", shape.k))
        weights = b.input("weights", Tensor.of("f32", "T", shape.k))
    rows = shape.f if at["layout"] == "none" else 2 * shape.f
    first = b.add(Weight(ref="first", type=Tensor.of(dtype, shape.experts, rows, shape.d)))
    second = b.add(Weight(ref="second", type=Tensor.of(dtype, shape.experts, shape.d, shape.f)))
    return b.build(b.add(ExpertFfn(x, ids, weights, first, second, **at)))


def doctor() -> list[dict[str, Any]]:
    from moec.backends.onnx.defects_cuda import examine_cuda

    found = examine_cuda()
    rows = [[one.name, one.op, one.asks, one.status, one.found] for one in found]
    print(table(["case", "op", "asks for", "is", "found"], rows))
    return [vars(one) for one in found]


def parity() -> list[dict[str, Any]]:
    """Each activation and type as MoE and as QMoE on the CUDA provider, over routings that are easy to get wrong."""
    found = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for name, at in ACTIVATIONS.items():
            shape = Shape(6, 2, 256, 384, gated=at["layout"] != "none")
            layer = Layer(shape, dtype, "cpu")
            forms = [Form(experts="moe"), *(QMOE.values() if dtype != torch.float32 else ())]
            alone = region(shape, KINDS[dtype], routed=False, **at)
            tried: list[tuple[str, Region, Form]] = [("sorted rows", alone, EXACT)]
            for form in forms:
                title = f"{form.experts} {form.bits if form.rounds_weights else ''}"
                tried.append((title, alone, form))
                for normalize in (True, False):
                    routed = with_router(alone, normalize, KINDS[dtype])
                    words = f"{title}, own router{', normalized' * normalize}"
                    tried.append((words, routed, replace(form, router=True)))
            for title, exact, form in tried:
                providers = [(CUDA, {"use_tf32": "0"}), CPU]
                check = check_region(exact, exact, store(layer), form, 2e-6, providers)
                found.append(
                    {"type": KINDS[dtype], "layer": name, "form": title, "error": check.max_error, "why": check.why}
                )
    rows = [[r["type"], r["layer"], r["form"], f"{r['error']:.1e}", r["why"] or "right"] for r in found]
    print(table(["type", "layer", "form", "error", "found"], rows, right=["error"]))
    return found


def by_hand(layer: Layer, *, bits: int | None) -> Any:
    """One MoE or QMoE node over x and logits, as its documentation writes it."""
    shape = layer.shape
    emit = Emitter("hand")
    x, logits = (
        ir.Value(name=name, shape=ir.Shape(["T", size]), type=ir.TensorType(DTYPES["f16"]))
        for name, size in (("x", shape.d), ("logits", shape.experts))
    )

    def first(e: int) -> torch.Tensor:
        return torch.stack(layer.get_parameter("first")[e].chunk(2), 1).flatten(0, 1)

    def second(e: int) -> torch.Tensor:
        return layer.get_parameter("second")[e]

    banks = [[partial(one, e) for e in range(shape.experts)] for one in (first, second)]
    at: dict[str, Any] = {"k": shape.k, "normalize_routing_weights": 1, "activation_type": "swiglu"}
    at |= {"swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
    if bits is None:
        w = [stacked(emit, name, bank, "f16") for name, bank in zip("io", banks, strict=True)]
        y = emit.op("MoE", x, logits, w[0], None, w[1], domain=DOMAIN, **at)
    else:
        form = QMOE[bits]
        q = [
            rounded_in_blocks(emit, n, b, "f16", bits=bits, block=form.block) for n, b in zip("io", banks, strict=True)
        ]
        at |= {"expert_weight_bits": bits, "block_size": form.block, "weights_prepacked": 0}
        y = emit.op("QMoE", x, logits, *q[0], None, *q[1], domain=DOMAIN, **at)
    y.name, y.shape, y.type = "out:y", ir.Shape(["T", shape.d]), ir.TensorType(DTYPES["f16"])
    opsets = {"": OPSET, **emit.domains}
    graph = ir.Graph(
        [x, logits], [y], nodes=emit.nodes, initializers=emit.initializers, opset_imports=opsets, name="hand"
    )
    return ir.Model(graph, ir_version=10)


def layer_latency(text: str, tokens: Sequence[int], seconds: float) -> list[dict[str, Any]]:
    """moec's files beside hand-built nodes in one run; errors against the layer in fp32, expert by expert."""
    shape = Shape.parse(text)
    layer = Layer(shape, torch.float16)
    made: dict[str, Any] = {}
    builders: dict[str, Callable[[], Any]] = {"MoE by hand": partial(by_hand, layer, bits=None)}
    exact = region(shape, "f16", routed=True, **ACTIVATIONS["silu"])
    forms = {"MoE": Form(experts="moe"), **{f"QMoE int{bits}": QMOE[bits] for bits in (8, 4)}}
    for title, form in forms.items():
        bits = form.bits if form.rounds_weights else None
        builders[f"{title} by hand"] = partial(by_hand, layer, bits=bits)
        builders[f"moec, {title}"] = partial(region_model, exact, store(layer), form=replace(form, router=True))
        builders[f"moec, {title}, log-weights"] = partial(region_model, exact, store(layer), form=form)
    if shape.d * shape.f < 4e6:
        builders["moec, portable (fp32 products)"] = lambda: region_model(exact, store(layer))
    found = []
    for name, build in builders.items():
        start = time.perf_counter()
        try:
            made[name] = session(build(), providers=[CUDA, CPU])
            print(f"  {text}: {name}: written and loaded in {time.perf_counter() - start:.1f} s", flush=True)
        except Exception as error:  # ONNX Runtime's errors have no common class
            found.append({"layer": text, "file": name, "failed": str(error).strip().splitlines()[0][:200]})
            print(f"  {text}: {name}: {found[-1]['failed']}", flush=True)
    for count in tokens:
        x = torch.randn(count, shape.d, device="cuda", dtype=torch.float16)
        logits = torch.randn(count, shape.experts, device="cuda", dtype=torch.float16)
        theirs = expected(layer, x, logits.float())
        calls, results = {}, {}
        for name, one in made.items():
            results[name] = torch.empty_like(x)
            output = one.get_outputs()[0].name
            calls[name] = partial(run_bound, one, [("x", x), ("logits", logits)], [(output, results[name])])
        for name in list(calls):
            try:
                calls[name]()
            except Exception as error:
                found.append({"layer": text, "file": name, "failed": str(error).strip().splitlines()[0][:200]})
                del calls[name]
        for name, us in interleaved(calls, seconds).items():
            error = float((results[name].float() - theirs).norm() / theirs.norm())
            found.append({"layer": text, "tokens": count, "file": name, "us": us, "error": error})
    return found


def expected(layer: Layer, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """x[T, D], logits[T, E] -> f32[T, D]."""
    weights, ids = logits.softmax(-1).topk(layer.shape.k, -1)
    weights = weights / weights.sum(-1, keepdim=True)
    out = torch.zeros(x.shape, device=x.device)
    for e in range(layer.shape.experts):
        token, slot = torch.where(ids == e)
        if len(token):
            out.index_add_(0, token, layer.expert(e, x[token].float()) * weights[token, slot, None])
    return out


def layers(texts: Sequence[str], tokens: Sequence[int], seconds: float) -> list[dict[str, Any]]:
    found = []
    for text in texts:
        found += layer_latency(text, tokens, seconds)
        torch.cuda.empty_cache()
    timed = [one for one in found if "us" in one]
    us = {(one["layer"], one["tokens"], one["file"]): one["us"] for one in timed}
    rows = []
    for one in timed:
        rival = one["file"].removeprefix("moec, ").removesuffix(", log-weights") + " by hand"
        beside = us.get((one["layer"], one["tokens"], rival))
        one["beside_hand"] = None if beside is None else one["us"] / beside
        ratio = "" if beside is None else f"{one['us'] / beside:.2f}"
        rows.append([one["layer"], str(one["tokens"]), one["file"], f"{one['us']:.0f}", ratio, f"{one['error']:.1e}"])
    headers = ["layer", "tokens", "file", "us", "of the time by hand", "error"]
    print(table(headers, rows, right=["tokens", "us", "of the time by hand", "error"]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="*", default=list(LAYERS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 32, 256, 1024])
    parser.add_argument("--seconds", type=float, default=0.4, help="for each file and number of tokens")
    parser.add_argument("--skip", nargs="*", choices=PARTS, default=[])
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    check_installed()
    if why_no_cuda():
        sys.exit(f"nothing to measure: {why_no_cuda()}")
    runs: dict[str, Callable[[], Any]] = {
        "doctor": doctor,
        "parity": parity,
        "layers": lambda: layers(arguments.layers, arguments.tokens, arguments.seconds),
        "model": lambda: model(arguments.tokens, arguments.seconds),
        "compile": compiled,
    }
    results: dict[str, Any] = {"machine": machine(), "gpu": torch.cuda.get_device_name(), "versions": versions()}
    for name in PARTS:
        if name in arguments.skip:
            continue
        print(f"\n{name}", flush=True)
        start = time.perf_counter()
        try:
            results[name] = runs[name]()
        except Exception:  # one part that fails leaves the others to run; it is reported, and the exit status says so
            results[name] = {"failed": traceback.format_exc()}
            print(results[name]["failed"], flush=True)
        print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
        if arguments.json is not None:
            arguments.json.write_text(dumps(results), encoding="utf-8")
    print(f"\n{results['gpu']}; " + ", ".join(f"{name} {version}" for name, version in versions().items()))
    sys.exit(any(isinstance(results.get(name), dict) for name in PARTS))


if __name__ == "__main__":
    main()
