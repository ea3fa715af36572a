"""Every type of causal language model that transformers has, built small from its own config."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

_OLD = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23)
_OTHER_THEN = ("aria_text",) if _OLD else ()  # its experts had another form
TYPES = tuple(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in _OTHER_THEN)
"""Model types, as ``config.json`` names them."""

_HIDDEN = ("hidden_size", "d_model", "n_embd", "embedding_size")
_WIDTH = ("intermediate_size", "ffn_hidden_size", "d_ff", "ffn_dim", "n_inner", "decoder_ffn_dim")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_NARROW = ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size")
SIZES: dict[str, Any] = {
    **dict.fromkeys(_HIDDEN, 32),
    **dict.fromkeys(_WIDTH, 48),
    **dict.fromkeys(_LAYERS, 4),
    **dict.fromkeys(_HEADS, 4),
    **dict.fromkeys(_EXPERTS, 4),
    **dict.fromkeys(_NARROW, 16),
    # vocabulary and positions
    "vocab_size": 128, "vocab_size_per_layer_input": 128, "max_position_embeddings": 64,
    "n_positions": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 8,
    # attention
    "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8, "attention_head_size": 8,
    "d_kv": 8, "query_pre_attn_scalar": 8, "rotary_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "index_n_heads": 2,
    "index_head_dim": 8, "index_topk": 8,
    # mixtures of experts
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "num_nextn_predict_layers": 0, "num_mtp_layers": 0,
    # linear attention and state spaces
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2,
    "mamba_d_ssm": 64, "mamba_d_state": 16, "n_mamba_heads": 2,
    # encoders, and the rest
    "encoder_layers": 4, "encoder_ffn_dim": 48, "encoder_attention_heads": 4,
    "hidden_size_per_layer_input": 8, "dim_model_base": 8,
    # what published models scale by, which is 1 in a fresh config
    "residual_multiplier": 0.22, "embedding_multiplier": 12.0, "logits_scaling": 8.0,
    "logit_scale": 0.3, "final_logit_softcapping": 0.5,
}  # fmt: skip
"""Small values of all fields that some config has."""

_LATENT = {"num_key_value_heads": 4, "head_dim": None}
_NO_CACHE = {"use_cache": False}
_FULL = {"layer_types": ["full_attention"] * 4}
OTHERS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32"), _LATENT),
    **dict.fromkeys(
        ("glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "minicpm3", "youtu"), _LATENT
    ),
    **dict.fromkeys(("bamba", "bart", "bigbird_pegasus", "jamba", "xlstm"), _NO_CACHE),
    **dict.fromkeys(("granitemoehybrid", "lfm2_moe"), _FULL),
    "dots3_note_text": {**_LATENT, **_FULL},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "zamba": {"num_hidden_layers": 8},
    "zaya": {"num_experts_per_tok": 1},
}
"""Fields of one type; None leaves the type's own value."""


def build(model_type: str, **changes: Any) -> Any:
    """A random model of a type, in eval mode; the same every time.

    Raises:
        Exception: the type cannot be built like this.
    """
    own = CONFIG_MAPPING[model_type]().to_dict()
    options = {
        **_known(own),
        **{
            name: {**_known(part), "model_type": part["model_type"]}
            for name, part in own.items()
            if isinstance(part, dict) and "model_type" in part
        },
        **OTHERS.get(model_type, {}),
        **changes,
    }
    given = {name: value for name, value in options.items() if value is not None}
    config = CONFIG_MAPPING[model_type](**given)
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        size = sum(p.numel() for p in auto.from_config(config).parameters())
    if size > 30_000_000:
        raise ValueError(f"{size:,} parameters")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return auto.from_config(config).eval()


def _known(own: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in SIZES.items() if k in own and not isinstance(own[k], list | dict)}
