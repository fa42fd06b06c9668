"""What compiling costs: time and memory for one layer of Mixtral-8x7B's size, and for models of 48 and 61 layers.

Weights are random. Memory is the process's peak while compiling, over what the layer's weights take.

    python examples/benchmarks/compile_cost.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import MixtralConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

import moec
from moec.environment import machine, versions
from moec.table import table


@dataclass
class Cost:
    """One compilation. `peak` is the highest memory as a multiple of the weights; None where that cannot be read."""

    what: str
    compiled: str
    seconds: float
    cpu_seconds: float
    peak: float | None
    error: float


def mixtral_layer() -> nn.Module:
    """One sparse block: 8 experts, 2 per token, width 4096, expert width 14336, bf16."""
    config = MixtralConfig(hidden_size=4096, intermediate_size=14336, num_local_experts=8, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    torch.set_default_dtype(torch.bfloat16)
    block = MixtralSparseMoeBlock(config).eval()
    torch.set_default_dtype(torch.float32)
    for p in block.parameters():
        nn.init.normal_(p, std=0.02)
    return block


def deep_model(layers: int, experts: int, implementation: str) -> nn.Module:
    """So many layers of so many experts, 8 per token, with small widths, computed as transformers calls it."""
    config = Qwen3MoeConfig(
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=experts,
        num_experts_per_tok=8,
        vocab_size=128,
    )
    model: nn.Module = Qwen3MoeForCausalLM._from_config(config, experts_implementation=implementation)
    return model.eval()


def resident() -> int | None:
    """Bytes of memory that this process holds; None where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except OSError:
        return None


def measure(what: str, make: Callable[[], nn.Module]) -> Cost:
    """Compile once, watching memory."""
    model = make()
    weights = sum(p.nbytes for p in model.parameters())
    before, highest = resident(), [0]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            highest[0] = max(highest[0], resident() or 0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start, busy = time.perf_counter(), time.process_time()
    report = moec.compile(model).moec.report
    seconds, cpu = time.perf_counter() - start, time.process_time() - busy
    over.set()
    watcher.join()
    peak = None if before is None else (highest[0] - before + weights) / weights
    error = max((layer.max_error or 0.0 for layer in report.compiled), default=float("nan"))
    return Cost(what, f"{len(report.compiled)} of {len(report.layers)}", seconds, cpu, peak, error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    costs = [
        # The small one first: memory that a large one leaves to the process would hide its peak.
        # As Qwen3-30B-A3B has them, and as DeepSeek-V3 has, by a loop over the experts.
        measure("48 layers, E128 k8 D64 F32, f32", partial(deep_model, 48, 128, "grouped_mm")),
        measure("61 layers, E256 k8 D64 F32, f32, a loop", partial(deep_model, 61, 256, "eager")),
        measure("one layer, E8 k2 D4096 F14336, bf16", mixtral_layer),
    ]
    print(machine(), versions(), sep="\n")
    rows = [
        (
            c.what,
            c.compiled,
            f"{c.seconds:.1f}",
            f"{c.cpu_seconds:.1f}",
            f"{c.peak:.2f}x" if c.peak else "-",
            f"{c.error:.1e}",
        )
        for c in costs
    ]
    print(
        table(
            ("model", "layers compiled", "seconds", "of CPU", "peak memory", "worst error"),
            rows,
            right=("seconds", "of CPU", "peak memory"),
        )
    )
    if arguments.json:
        facts = {"machine": machine(), "versions": versions()}
        arguments.json.write_text(json.dumps({**facts, "costs": [asdict(c) for c in costs]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
