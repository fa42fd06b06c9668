"""Compile a transformers Mixtral and generate with it before and after: the same tokens, and how long each takes.

    python examples/generate_mixtral.py
    python examples/generate_mixtral.py --batch 4 --new-tokens 128 --pack

The model is made from a configuration with random weights, so nothing is downloaded; everything else is as with a
checkpoint: compile() leaves the router, the attention, the cache and generate() to transformers and replaces the
experts. Needs transformers beside moec. `moec bench examples/generate_mixtral.py:build` times the layers one by one.
"""

import argparse
import statistics
import time

import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

import moec


def build() -> MixtralForCausalLM:
    """A Mixtral of 4 layers with 8 experts, 2 per token: 28 million parameters."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        bos_token_id=1,
        eos_token_id=None,  # random weights would stop early, and each prompt elsewhere
        pad_token_id=0,
    )
    return MixtralForCausalLM(config).eval()


def generate(model: MixtralForCausalLM, prompt: Tensor, new_tokens: int) -> tuple[Tensor, float]:
    """Greedy tokens[B, S + new_tokens] for prompt[B, S], and the seconds it took."""
    started = time.perf_counter()
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, do_sample=False)
    return tokens, time.perf_counter() - started


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Generate with a Mixtral before and after moec.compile.")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--pack", action="store_true", help="keep a second, faster copy of the experts' weights")
    args = parser.parse_args(argv)

    model = build()
    print(f"Mixtral with {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters, random weights")
    fast = moec.compile(model, pack=args.pack)
    print(fast.moec.report)

    # The same class, the same parameters: everything that takes a Mixtral takes this one.
    assert type(fast) is type(model)
    assert fast.lm_head.weight is model.lm_head.weight

    prompt = torch.randint(2, model.config.vocab_size, (args.batch, args.prompt_tokens))
    times: tuple[list[float], list[float]] = ([], [])
    for run in range(args.runs + 1):
        (before, old_seconds), (after, new_seconds) = (generate(m, prompt, args.new_tokens) for m in (model, fast))
        assert torch.equal(before, after), "the compiled model generated other tokens"
        if run > 0:  # the first warms up
            times[0].append(old_seconds)
            times[1].append(new_seconds)
    old, new = map(statistics.median, times)
    print(
        f"\ngenerate: {args.new_tokens} new tokens for {args.batch} prompts of {args.prompt_tokens}, equal every time"
    )
    print(f"before {old * 1e3:.0f} ms, after {new * 1e3:.0f} ms: {old / new:.2f}x (medians of {args.runs} runs)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
