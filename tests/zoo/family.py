"""What an entry of the zoo is, and the sizes that all of them share.

Numbers of experts, groups and widths differ from each other, so that none can be taken for another.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Inputs = Literal["tokens", "pair", "image", "modal", "embedded"]
Settings = dict[str, Any]

# Every configuration takes those of these that it has a field for.
SIZES: Settings = {
    "vocab_size": 120,
    "hidden_size": 48,
    "intermediate_size": 56,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 28,
    "shared_intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 6),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    "n_group": 3,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
    "first_k_dense_replace": 0,
    "decoder_sparse_step": 1,
    "num_dense_layers": 0,
    "moe_layer_start_index": 0,
    "layer_group_size": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 4,
    "v_head_dim": 12,
    "sliding_window": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 32,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 12,
    "linear_num_heads": 4,
    "mamba_n_heads": 4,
    "mamba_d_head": 24,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
    "mamba_dt_rank": 8,
}
SPARSE = {"mlp_layer_types": ["sparse"] * 2}
FULL = {"layer_types": ["full_attention"] * 2}
MIXED = {"layer_types": ["linear_attention", "full_attention"]}
EVERY_HEAD = {"num_key_value_heads": 4}
SECTIONS = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [2, 2, 2],
        "partial_rotary_factor": 1.0,
    }
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """How to build one tiny model of a family."""

    family: str
    cls: str
    mixtures: int = 2
    settings: Settings = field(default_factory=dict)
    without: tuple[str, ...] = ()  # sizes that this configuration derives itself
    inputs: Inputs = "tokens"
    instead: str = ""  # what the report says of its layers where they are no mixtures
    variant: str = ""

    @property
    def name(self) -> str:
        return f"{self.family}.{self.variant}" if self.variant else self.family


def of(family: str, cls: str, *shared: Settings, **more: Any) -> Family:
    """A family; keywords that are no field are settings."""
    known = {name: more.pop(name) for name in ("mixtures", "without", "inputs", "instead") if name in more}
    settings: Settings = {}
    for given in (*shared, more):
        settings.update(given)
    return Family(family=family, cls=cls, settings=settings, **known)
