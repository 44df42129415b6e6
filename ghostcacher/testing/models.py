"""Tiny random models, built from configs in milliseconds, whose attention is far from uniform."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 128
_BASE: Mapping[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96, "max_position_embeddings": 512,
    "sliding_window": 8, "attention_chunk_size": 8, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    "tie_word_embeddings": False,
}  # fmt: skip
_ALTERNATING: Mapping[str, Any] = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_LATENT: Mapping[str, Any] = {
    "num_key_value_heads": 4, "head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 12, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_INDEX: Mapping[str, Any] = {"index_head_dim": 16, "index_n_heads": 16, "index_topk": 16}
_SHARING: Mapping[str, Any] = {
    "num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3, "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
}  # fmt: skip
_SSM: Mapping[str, Any] = {
    "mamba_num_heads": 4, "mamba_n_heads": 4, "mamba_head_dim": 32, "mamba_d_head": 32, "ssm_state_size": 16,
    "mamba_d_state": 16, "mamba_n_groups": 1, "n_groups": 1, "mamba_chunk_size": 8, "chunk_size": 8,
}  # fmt: skip

RECIPES: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_inner": 96, "n_positions": 512},
    "bloom": {"n_layer": 4, "n_head": 4},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "qwen3_moe": {},
    "mistral": {},
    "gemma2": {**_ALTERNATING, "query_pre_attn_scalar": 16},
    "gemma3_text": _ALTERNATING,
    "gpt_oss": _ALTERNATING,
    "llama4_text": {"layer_types": ["chunked_attention", "full_attention"] * 2, "no_rope_layers": [1, 0, 1, 0]},
    "gemma3n_text": {**_SHARING, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 6},
    "gemma4_text": {**_SHARING, "global_head_dim": 32, "num_global_key_value_heads": 1},
    "mimo_v2_flash": {
        **_ALTERNATING, "v_head_dim": 12, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4,
        "swa_head_dim": 16, "swa_v_head_dim": 12,
    },
    "deepseek_v3": _LATENT,
    "deepseek_v32": {**_LATENT, **_INDEX},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2, "index_head_dim": 16, "index_n_heads": 2,
        "index_block_size": 8, "index_topk_blocks": 8, "dense_intermediate_size": 96, "shared_intermediate_size": 32,
    },
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"] * 2, "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "shared_expert_intermediate_size": 32,
    },
    "falcon_h1": {**_SSM, "mamba_d_ssm": 128},
    "mamba2": {"head_dim": 32, "num_heads": 4, "state_size": 16, "n_groups": 1, "chunk_size": 8, "expand": 2},
    "nemotron_h": {**_SSM, "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "inkling_text": {},
    "deepseek_v4": {**_LATENT, **_INDEX, "head_dim": 16, "num_key_value_heads": 1},
    "dory": {"n_input_layers": 1, "n_output_layers": 1},
    "phi3": {
        "max_position_embeddings": 128, "original_max_position_embeddings": 32, "sliding_window": None,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
            "original_max_position_embeddings": 32,
        },
    },
    "mamba": {"state_size": 16, "time_step_rank": 8},
    "jamba": {"mamba_d_state": 16, "mamba_dt_rank": 8, "attn_layer_period": 2, "attn_layer_offset": 1},
    "llama with dynamic rope": {
        "max_position_embeddings": 32,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    },
    "minimax": {},
    "recurrent_gemma": {},
}  # fmt: skip
"""The parity matrix: every kind of state. Keys are model types, or begin with one."""

FULL_ATTENTION = ("bloom", "gpt2", "llama", "opt", "qwen3_moe")
"""Recipes whose layers are all full attention: reused to the last bit."""

_OPTIONAL = frozenset(_SSM)
"""Recipe fields that one of several configs has."""


def tiny_model(model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A random causal model of ``model_type`` with 4 layers of width 64 and 128 tokens, in ``eval`` mode.

    Equal arguments give equal weights. Base values are given only where the config has such a field.
    """
    recipe, model_type = RECIPES.get(model_type, {}), model_type.partition(" ")[0]
    blank = AutoConfig.for_model(model_type)
    names = set(blank.to_dict()) | set(getattr(type(blank), "attribute_map", {}))
    fields = {name: value for name, value in _BASE.items() if name in names}
    given = {name: value for name, value in recipe.items() if name in names or name not in _OPTIONAL}
    config = AutoConfig.for_model(model_type, **{**fields, **given, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        _spread(model)
    return model.eval()


def random_prompt(tokens: int, *, seed: int = 0, rows: int = 1) -> torch.Tensor:
    """Random token ids ``[rows, tokens]``, none of them padding."""
    return torch.randint(2, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def _spread(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, min(0.5, 1.2 / parameter.shape[-1] ** 0.5))
