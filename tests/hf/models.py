"""Tiny transformers models with random weights, built from configurations: no network, no checkpoint.

B sequences, S tokens a sequence, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moec

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

VOCABULARY = 120
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


@dataclass(frozen=True, kw_only=True)
class HfModel:
    """How to build one model, and which of its modules hold which kind of layer."""

    name: str
    build: Callable[[], nn.Module]
    layers: dict[str, str]  # path of the block -> "moe" or "ffn": each must compile
    optional: dict[str, str] = field(default_factory=dict)  # may compile on its own or as a part of its block
    encoder_decoder: bool = False
    generates: bool = True
    router_logits: bool = True

    def make(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build()
        randomize(model, seed)
        return model.to(dtype).eval()

    def inputs(self, batch: int = 2, tokens: int = 7, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(500 + seed)
        ids = torch.randint(3, VOCABULARY, (batch, tokens), generator=generator)
        if not self.encoder_decoder:
            return {"input_ids": ids}
        decoder = torch.randint(3, VOCABULARY, (batch, max(1, tokens - 2)), generator=generator)
        return {"input_ids": ids, "decoder_input_ids": decoder}


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Weights that matter: sure routers, correction biases away from zero, norms away from one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            leaf = name.rsplit(".", 1)[-1]
            if parameter.dim() == 1 and ("norm" in name.lower() or "ln" in name.lower()) and leaf == "weight":
                parameter.copy_(1 + 0.1 * noise)
            elif parameter.dim() == 1 or "bias" in leaf or "sinks" in leaf:
                parameter.copy_(0.2 * noise)
            elif "embed" in name or "shared.weight" in name or ".wte." in name:
                parameter.copy_(0.5 * noise)
            else:
                fan_in = parameter.shape[-1] if parameter.dim() == 2 else max(parameter.shape[-2:])
                router = any(part in name for part in ("router", ".gate.weight", "classifier"))
                parameter.copy_(noise * (1.5 if router else 1.0) / math.sqrt(fan_in))
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        **SIZES, num_key_value_heads=2, intermediate_size=40, num_local_experts=8, num_experts_per_tok=2
    )
    return built(transformers.MixtralForCausalLM, config)


def qwen3_moe() -> nn.Module:
    config = transformers.Qwen3MoeConfig(
        **{**SIZES, "num_hidden_layers": 3},
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=56,
        moe_intermediate_size=24,
        num_experts=12,
        num_experts_per_tok=3,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    )
    return built(transformers.Qwen3MoeForCausalLM, config)


def olmoe() -> nn.Module:
    config = transformers.OlmoeConfig(
        **SIZES, num_key_value_heads=2, intermediate_size=20, num_experts=16, num_experts_per_tok=4
    )
    return built(transformers.OlmoeForCausalLM, config)


def deepseek_v3() -> nn.Module:
    config = transformers.DeepseekV3Config(
        **{**SIZES, "num_hidden_layers": 3},
        num_key_value_heads=4,
        intermediate_size=56,
        moe_intermediate_size=24,
        n_routed_experts=8,
        n_shared_experts=2,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=12,
        routed_scaling_factor=1.7,
    )
    return built(transformers.DeepseekV3ForCausalLM, config)


def gpt_oss() -> nn.Module:
    config = transformers.GptOssConfig(
        **SIZES,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=28,
        num_local_experts=8,
        num_experts_per_tok=4,
        sliding_window=16,
    )
    return built(transformers.GptOssForCausalLM, config)


def dbrx() -> nn.Module:
    config = transformers.DbrxConfig(
        d_model=48,
        n_heads=4,
        n_layers=2,
        max_seq_len=128,
        vocab_size=VOCABULARY,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        ffn_config={"hidden_size": 48, "ffn_hidden_size": 28, "moe_num_experts": 8, "moe_top_k": 2},
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return built(transformers.DbrxForCausalLM, config)


def switch() -> nn.Module:
    config = transformers.SwitchTransformersConfig(
        vocab_size=VOCABULARY,
        d_model=48,
        d_kv=12,
        d_ff=40,
        num_layers=2,
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_heads=4,
        num_experts=6,
        expert_capacity=3,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    )
    return built(transformers.SwitchTransformersForConditionalGeneration, config)


def bert() -> nn.Module:
    config = transformers.BertConfig(**{**SIZES, "intermediate_size": 72})
    return built(transformers.BertForMaskedLM, config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, intermediate_size=72)
    return built(transformers.LlamaForCausalLM, config)


def built(cls: Any, config: Any) -> nn.Module:
    """The model as it comes, with the experts of its own modeling file."""
    model: nn.Module = cls._from_config(config, **eager(cls))
    return model


def eager(cls: Any) -> dict[str, str]:
    """The option that keeps the experts of the modeling file, for classes that have another choice."""
    chooses = getattr(cls, "_can_set_experts_implementation", lambda: False)()
    return {"experts_implementation": "eager"} if chooses else {}


def decoder(prefix: str, kinds: str, part: str = "mlp") -> dict[str, str]:
    """kinds "mf": layer 0 holds a MoE, layer 1 a plain FFN."""
    return {f"{prefix}.{i}.{part}": {"m": "moe", "f": "ffn"}[kind] for i, kind in enumerate(kinds)}


MODELS = {
    model.name: model
    for model in (
        HfModel(name="mixtral", build=mixtral, layers=decoder("model.layers", "mm")),
        HfModel(name="qwen3_moe", build=qwen3_moe, layers=decoder("model.layers", "mfm")),
        HfModel(name="olmoe", build=olmoe, layers=decoder("model.layers", "mm")),
        HfModel(
            name="deepseek_v3",
            build=deepseek_v3,
            layers=decoder("model.layers", "fmm"),
            optional={f"model.layers.{i}.mlp.shared_experts": "ffn" for i in (1, 2)},
            router_logits=False,
        ),
        HfModel(name="gpt_oss", build=gpt_oss, layers=decoder("model.layers", "mm")),
        HfModel(name="dbrx", build=dbrx, layers=decoder("transformer.blocks", "mm", "ffn")),
        HfModel(
            name="switch",
            build=switch,
            layers={
                "encoder.block.0.layer.1.mlp": "ffn",
                "encoder.block.1.layer.1.mlp": "moe",
                "decoder.block.0.layer.2.mlp": "ffn",
                "decoder.block.1.layer.2.mlp": "moe",
            },
            encoder_decoder=True,
        ),
        HfModel(
            name="bert",
            build=bert,
            layers={"bert.encoder.layer.0": "ffn", "bert.encoder.layer.1": "ffn"},
            generates=False,
            router_logits=False,
        ),
        HfModel(name="llama", build=llama, layers=decoder("model.layers", "ff"), router_logits=False),
    )
}
MIXTURES = [name for name, model in MODELS.items() if "moe" in model.layers.values()]


def compiled(name: str, **options: Any) -> tuple[Any, Any]:
    """(original, compiled) of its own, for tests that write to them."""
    model = MODELS[name].make()
    return model, moec.compile(model, example_inputs=MODELS[name].inputs(), **options)


@cache
def pair(name: str) -> tuple[Any, Any]:
    """(original, compiled), shared by tests that write to neither."""
    return compiled(name)
