"""One tiny model with random weights for each family of transformers 4.46 and 4.57 that has a MoE block.

The installed release is the one in front of the environment: `make test-legacy`. B sequences, S tokens a sequence.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.hf.models import randomize

VOCABULARY = 120
# Given to every configuration that knows the name.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 0,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "decoder_sparse_step": 1,
    "moe_layer_start_index": 0,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "sliding_window": 16,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
    "mamba_dt_rank": 8,
    "use_mamba_kernels": False,
    "shared_intermediate_size": 32,
    "routed_scaling_factor": 1.5,
}
# Latent attention has as many key heads as query heads.
LATENT = {"num_key_value_heads": 4}


def tokens(batch: int, length: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(500 + seed)
    return {"input_ids": torch.randint(3, VOCABULARY, (batch, length), generator=generator)}


def both_sides(batch: int, length: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(500 + seed)
    ids, decoder = (torch.randint(3, VOCABULARY, (batch, n), generator=generator) for n in (length, max(1, length - 2)))
    return {"input_ids": ids, "decoder_input_ids": decoder}


def images(batch: int, length: int, seed: int) -> dict[str, Tensor]:
    """Images have one size; `length` only says which data sets they are from."""
    generator = torch.Generator().manual_seed(500 + seed)
    sets = (torch.arange(batch) + length) % 4
    return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator), "dataset_index": sets}


@dataclass(frozen=True)
class Family:
    """One model: the modeling file and class, what its configuration needs, and which modules are its MoE blocks.

    `blocks` are the blocks' paths, written by hand: the check that a layer is compiled as a mixture is by place.
    `refused` is a part of the reason where none of them compiles, `broken` of the error where the release's own code
    does not run.
    """

    name: str
    cls: str
    blocks: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[int, int, int], dict[str, Tensor]] = tokens
    generates: bool = True
    refused: str = ""
    broken: str = ""

    def make(self) -> Any:
        """The model in eval mode."""
        cls = getattr(importlib.import_module(f"transformers.models.{self.name}.modeling_{self.name}"), self.cls)
        names = inspect.signature(cls.config_class.__init__).parameters
        known = {k: v for k, v in SIZES.items() if k in names or k in ("pad_token_id", "bos_token_id", "eos_token_id")}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: nn.Module = cls(cls.config_class(**{**known, **self.settings}))
        randomize(model, 0)
        return model.eval()


def layers(path: str = "model.layers.{}.mlp", which: tuple[int, ...] = (0, 1)) -> tuple[str, ...]:
    return tuple(path.format(i) for i in which)


def dbrx() -> dict[str, Any]:
    return {
        "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2, "ffn_act_fn": {"name": "silu"}},
    }  # fmt: skip


NLLB = {
    "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_model": 64,
    "encoder_sparse_step": 2, "decoder_sparse_step": 2,
    "expert_capacity": 64, "pad_token_id": 1, "bos_token_id": 0, "decoder_start_token_id": 2,
}  # fmt: skip
SWITCH = {
    "d_model": 64, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "expert_capacity": 3, "decoder_start_token_id": 0,
}  # fmt: skip
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
SECTIONS = {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
SHARED = "model.layers.{}.block_sparse_moe"

OLD = (
    Family("dbrx", "DbrxForCausalLM", layers("transformer.blocks.{}.ffn"), dbrx()),
    Family("granitemoe", "GraniteMoeForCausalLM", layers(SHARED)),
    Family("jamba", "JambaForCausalLM", layers("model.layers.{}.feed_forward", (1,)), JAMBA),
    Family("jetmoe", "JetMoeForCausalLM", layers(), {"kv_channels": 16}),
    Family("mixtral", "MixtralForCausalLM", layers(SHARED)),
    Family(
        "nllb_moe", "NllbMoeForConditionalGeneration",
        ("model.encoder.layers.1.ffn", "model.decoder.layers.1.ffn"), NLLB, both_sides,
    ),
    Family("olmoe", "OlmoeForCausalLM", layers()),
    Family("phimoe", "PhimoeForCausalLM", layers(SHARED)),
    Family("qwen2_moe", "Qwen2MoeForCausalLM", layers()),
    Family(
        "switch_transformers", "SwitchTransformersForConditionalGeneration",
        ("encoder.block.1.layer.1.mlp", "decoder.block.1.layer.2.mlp"), SWITCH, both_sides,
    ),
)  # fmt: skip
MORE = (
    Family("aria", "AriaTextForCausalLM", layers()),
    Family("deepseek_v2", "DeepseekV2ForCausalLM", layers(), {**LATENT, "topk_method": "group_limited_greedy"}),
    Family("deepseek_v3", "DeepseekV3ForCausalLM", layers(), LATENT),
    Family(
        "doge", "DogeForCausalLM", layers(), {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 4},
        broken="must be Tensor, not tuple",
    ),
    Family("dots1", "Dots1ForCausalLM", layers()),
    Family("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", layers()),
    Family("flex_olmo", "FlexOlmoForCausalLM", layers()),
    Family("glm4_moe", "Glm4MoeForCausalLM", layers()),
    Family(
        "glm4v_moe", "Glm4vMoeTextModel", layers("layers.{}.mlp"),
        {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}}, generates=False,
    ),
    Family("gpt_oss", "GptOssForCausalLM", layers()),
    Family("granitemoehybrid", "GraniteMoeHybridForCausalLM", layers(SHARED), {"layer_types": ["mamba", "attention"]}),
    Family("granitemoeshared", "GraniteMoeSharedForCausalLM", layers(SHARED)),
    Family("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM", layers()),
    Family("llama4", "Llama4ForCausalLM", layers("model.layers.{}.feed_forward"), {"interleave_moe_layer_step": 1}),
    Family(
        "longcat_flash", "LongcatFlashForCausalLM", layers(),
        {
            **LATENT, "num_layers": 2, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 32, "zero_expert_num": 4,
            "qk_head_dim": 16, "head_dim": 8, "moe_topk": 3,
        },
    ),
    Family(
        "minimax", "MiniMaxForCausalLM", layers(SHARED), {"layer_types": ["full_attention"] * 2},
    ),
    Family("qwen3_moe", "Qwen3MoeForCausalLM", layers(), {"norm_topk_prob": True}),
    Family(
        "qwen3_next", "Qwen3NextForCausalLM", layers(), {"layer_types": ["linear_attention", "full_attention"]},
    ),
    Family("qwen3_omni_moe", "Qwen3OmniMoeThinkerTextModel", layers("layers.{}.mlp"), SECTIONS, generates=False),
    Family("qwen3_vl_moe", "Qwen3VLMoeTextModel", layers("layers.{}.mlp"), SECTIONS, generates=False),
    Family(
        "vitpose_backbone", "VitPoseBackbone", layers("encoder.layer.{}.mlp"),
        {
            "image_size": [32, 32], "patch_size": [8, 8], "num_experts": 4, "part_features": 16, "mlp_ratio": 2,
        },
        images, generates=False,
    ),
)  # fmt: skip
