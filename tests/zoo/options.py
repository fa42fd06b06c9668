"""The options that the families' routers and experts have, as entries of their own."""

from __future__ import annotations

from dataclasses import replace

from tests.zoo.families import FAMILIES
from tests.zoo.family import Settings

# The same classes with other answers from their routers and experts: family -> variant -> settings.
_OPTIONS: dict[str, dict[str, Settings]] = {
    "cohere2_moe": {
        "sigmoid": {"expert_selection_fn": "sigmoid"},
        "unnormalized": {"norm_topk_prob": False},
        "sum": {"shared_expert_combination_strategy": "sum"},
    },
    "deepseek_ocr2": {"groups": {"topk_method": "group_limited_greedy"}},
    "deepseek_v2": {"greedy": {"topk_method": "greedy"}},
    "deepseek_v3": {"unnormalized": {"norm_topk_prob": False}, "one_group": {"n_group": 1, "topk_group": 1}},
    "deepseek_v4": {"low_limit": {"swiglu_limit": 1.5}},
    "dots1": {"normalized": {"norm_topk_prob": True}},
    "ernie4_5_vl_moe": {"text": {}},
    "exaone_moe": {"unnormalized": {"norm_topk_prob": False}},
    "flex_olmo": {"normalized": {"norm_topk_prob": True}},
    "flint": {"unnormalized": {"norm_topk_prob": False}},
    "glm4_moe": {"unnormalized": {"norm_topk_prob": False}},
    "glm5_next": {"low_limit": {"swiglu_limit": 1.5}},
    "gpt_oss": {"low_limit": {"swiglu_limit": 1.5, "swiglu_alpha": 1.2}},
    "hy_v3": {"narrow_combine": {"enable_moe_fp32_combine": False}},
    "inkling2": {"low_caps": {"mlp_gate_softcap": 1.5, "mlp_up_softcap": 3.0}},
    "kolibri1": {"normalized": {"norm_topk_prob": True}},
    "laguna": {"uncapped": {"moe_router_logit_softcapping": 0.0}},
    "lfm2_moe": {"unbiased": {"use_expert_bias": False}, "unnormalized": {"norm_topk_prob": False}},
    "llama4": {"one": {"num_experts_per_tok": 1}},
    "longcat_flash": {"no_identity": {"zero_expert_num": 0}, "two": {"moe_topk": 2}},
    "mellum": {"unnormalized": {"norm_topk_prob": False}},
    "mistral4": {"unnormalized": {"norm_topk_prob": False}},
    "mixtral": {"gelu": {"hidden_act": "gelu"}, "one": {"num_experts_per_tok": 1}, "every": {"num_experts_per_tok": 6}},
    "nemotron_h": {"not_latent": {"moe_latent_size": None}, "unnormalized": {"norm_topk_prob": False}},
    "nllb_moe": {
        "router_bias": {"router_bias": True},
        "normalized_first": {"normalize_router_prob_before_dropping": True},
    },
    "olmoe": {"normalized": {"norm_topk_prob": True}},
    "qwen2_moe": {"normalized": {"norm_topk_prob": True}},
    "qwen3_moe": {"unnormalized": {"norm_topk_prob": False}},
    "qwen3_next": {"unnormalized": {"norm_topk_prob": False}},
    "solar_open": {"unnormalized": {"norm_topk_prob": False}},
    "step3p7": {"low_limits": {"swiglu_limits": [1.5, 0.7], "swiglu_limits_shared": [1.5, 0.7]}},
    "switch_transformers": {"router_bias": {"router_bias": True}, "roomy": {"expert_capacity": 64}},
}
VARIANTS = {
    f"{family}.{variant}": replace(FAMILIES[family], settings={**FAMILIES[family].settings, **changed}, variant=variant)
    for family, variants in _OPTIONS.items()
    for variant, changed in variants.items()
}
# Without modality ids all tokens are text, and half of the mixtures never run.
VARIANTS["ernie4_5_vl_moe.text"] = replace(VARIANTS["ernie4_5_vl_moe.text"], inputs="embedded")
ENTRIES = {**FAMILIES, **VARIANTS}

# One for each kind of router and expert that there is.
QUICK = (
    "deepseek_v2",
    "deepseek_v4",
    "ernie4_5_vl_moe",
    "inkling2",
    "jetmoe",
    "llama4",
    "longcat_flash",
    "muse_spark",
    "nemotron_h",
    "nllb_moe",
    "vitpose_backbone",
)
