"""Whole models on ONNX Runtime's CUDA provider, for onnx_gpu.py: exported by torch and by moec, and compiled."""

from __future__ import annotations

import copy
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import moec
from moec.backends.onnx.providers import CPU, CUDA
from moec.backends.onnx.runtime import session
from moec.table import table


def interleaved(calls: dict[str, Callable[[], None]], seconds: float) -> dict[str, float]:
    """Microseconds of each, medians of calls in turns, every round in another order."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    order, shuffle = list(calls), random.Random(0).shuffle
    end = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < end or len(times[order[0]]) < 5:
        shuffle(order)
        for name in order:
            torch.cuda.synchronize()
            start = time.perf_counter()
            calls[name]()
            times[name].append((time.perf_counter() - start) * 1e6)
    return {name: statistics.median(found) for name, found in times.items()}


def mixtral() -> Any:
    """Four layers of Mixtral with random weights and sure routers."""
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def model(tokens: Sequence[int], seconds: float) -> list[dict[str, Any]]:
    """A whole model: torch's own export of its batched experts beside moec's files for cuda."""
    one = mixtral()
    ids = torch.randint(3, 1000, (2, 16))
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="moec-") as folder:
        files = {"torch's export, fp32": partial(torch_export, one, ids)}
        half = copy.deepcopy(one).half()
        for title, exported in (("fp32", one), ("fp16", half)):
            for quantize in (None, "int8"):
                name = f"moec, {title}" + (f", {quantize}" if quantize else "")
                files[name] = partial(moec_export, exported, ids, quantize)
        made = {}
        for number, (name, write) in enumerate(files.items()):
            path = Path(folder) / f"{number}" / "model.onnx"
            path.parent.mkdir()
            start = time.perf_counter()
            try:
                about = write(path)
                made[name] = session(path, providers=[(CUDA, {"use_tf32": "0"}), CPU])
                print(f"  {name}: {time.perf_counter() - start:.1f} s {about}", flush=True)
            except Exception as error:  # torch's exporter and ONNX Runtime raise dozens of kinds
                found.append({"file": name, "failed": str(error).strip().splitlines()[0][:300]})
                print(f"  {name}: {found[-1]['failed']}", flush=True)
        for count in tokens:
            given = torch.randint(3, 1000, (1, count))
            with torch.no_grad():
                theirs = one(input_ids=given, use_cache=False).logits
            feed = {"input_ids": given.numpy()}
            calls = {name: partial(s.run, [s.get_outputs()[0].name], feed) for name, s in made.items()}
            for name, us in interleaved(calls, seconds).items():
                mine = torch.from_numpy(calls[name]()[0]).float()
                error = float((mine - theirs).norm() / theirs.norm())
                found.append({"tokens": count, "file": name, "us": us, "error": error})
    timed = [row for row in found if "us" in row]
    rows = [[str(r["tokens"]), r["file"], f"{r['us']:.0f}", f"{r['error']:.1e}"] for r in timed]
    print(table(["tokens", "file", "us", "error"], rows, right=["tokens", "us", "error"]))
    return found


def torch_export(one: Any, ids: torch.Tensor, path: Path) -> str:
    one.set_experts_implementation("batched_mm")
    dim = torch.export.Dim.DYNAMIC
    wrapped = _Logits(one)
    torch.onnx.export(
        wrapped, (ids,), path, dynamo=True, verbose=False, input_names=["input_ids"], output_names=["logits"],
        dynamic_shapes=({0: dim, 1: dim},), external_data=False,
    )  # fmt: skip
    one.set_experts_implementation("eager")
    return ""


class _Logits(torch.nn.Module):
    """The model's logits alone."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor) -> Any:
        return self.inner(input_ids=input_ids, use_cache=False).logits


def moec_export(one: Any, ids: torch.Tensor, quantize: str | None, path: Path) -> str:
    report = moec.export(one, path, {"input_ids": ids}, target="cuda", quantize=quantize)
    written = sorted({layer.lowering for layer in report.rewritten})
    tried = sorted({line for layer in report.rewritten for line in layer.tried})
    return f"{written} {tried} error {report.whole_model_error:.1e}"


def compiled() -> list[dict[str, Any]]:
    """moec.compile with ONNX Runtime on the GPU, beside the model itself."""
    one = mixtral().to("cuda")
    given = {"input_ids": torch.randint(3, 1000, (2, 33), device="cuda")}
    fast = moec.compile(one, example_inputs=given, backend="onnxruntime")
    with torch.no_grad():
        mine, theirs = fast(**given).logits, one(**given).logits
    error = float((mine - theirs).norm() / theirs.norm())
    layers = fast.moec.report.layers
    print(f"  {len(fast.moec.report.compiled)} layers, error {error:.1e}; {layers[0].plan if layers else ''}")
    reasons = [f"{layer.name}: {layer.reason}" for layer in layers if layer.reason] + fast.moec.report.notes
    print(*(f"  {reason}" for reason in reasons), sep="\n")
    found = {"layers": len(fast.moec.report.compiled), "error": error, "device": str(mine.device)}
    return [{**found, "reasons": reasons}]
