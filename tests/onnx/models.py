"""Models to export: tiny transformers models, and our own. B sequences, S tokens a sequence, D model width."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.hf.models import MODELS, SIZES, VOCABULARY, built, randomize, transformers


def nllb_moe() -> nn.Module:
    """Top-2 routing with a capacity, in an encoder and a decoder."""
    config = transformers.NllbMoeConfig(
        vocab_size=VOCABULARY,
        d_model=SIZES["hidden_size"],
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        num_experts=6,
        expert_capacity=4,
        max_position_embeddings=128,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=2,
    )
    return built(transformers.NllbMoeForConditionalGeneration, config)


def qwen2_moe() -> nn.Module:
    """Unnormalised weights, and beside the experts a shared one behind a gate of its own."""
    config = transformers.Qwen2MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=SIZES["hidden_size"],
        intermediate_size=40,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=6,
        num_experts_per_tok=2,
    )
    return built(transformers.Qwen2MoeForCausalLM, config)


OWN = {"nllb_moe": nllb_moe, "qwen2_moe": qwen2_moe}


def model(name: str) -> Any:
    """A model of random weights in eval mode, always the same."""
    if name not in OWN:
        return MODELS[name].make()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = OWN[name]()
    randomize(made)
    return made.eval()


def inputs(name: str, batch: int = 2, tokens: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    """Its arguments; encoders come with a mask, which transformers does not make while torch.export records."""
    if name == "qwen2_moe":
        made = MODELS["mixtral"].inputs(batch, tokens, seed)
    elif name != "nllb_moe":
        made = MODELS[name].inputs(batch, tokens, seed)
    else:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, VOCABULARY, (2, batch, tokens), generator=generator)
        made = {"input_ids": ids[0], "decoder_input_ids": ids[1, :, : max(1, tokens - 2)]}
    return made | {"attention_mask": torch.ones_like(made["input_ids"])} if "decoder_input_ids" in made else made


class OneLayer(nn.Module):
    """A MoE layer alone, x[N, D] -> [N, D]: the sum over chosen experts, written as a loop."""

    def __init__(self, dim: int = 16, hidden: int = 24, experts: int = 5, top_k: int = 2) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, experts, bias=False)
        self.up = nn.ModuleList(nn.Linear(dim, hidden) for _ in range(experts))
        self.down = nn.ModuleList(nn.Linear(hidden, dim) for _ in range(experts))
        self.top_k = top_k

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(self.top_k, dim=-1)
        out = torch.zeros_like(x)
        for e, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            token, slot = torch.where(chosen == e)
            out.index_add_(0, token, down(torch.relu(up(x[token]))) * weights[token, slot, None])
        return out
