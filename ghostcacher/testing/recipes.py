"""How to build any model type tiny: the parity matrix, fields that any config may have, what single types need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Fields = Mapping[str, Any]

VOCABULARY = 128

BASE: Fields = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96, "max_position_embeddings": 512,
    "sliding_window": 8, "attention_chunk_size": 8, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    "tie_word_embeddings": False,
    "d_model": 64, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_layers": 4, "n_heads": 4, "n_positions": 512,
    "n_inner": 96, "num_layers": 4, "num_heads": 4, "dim": 64, "ffn_dim": 96, "ffn_hidden_size": 96,
    "encoder_layers": 4, "decoder_layers": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_seq_len": 512, "attention_heads": 4,
    "word_embed_proj_dim": 64, "emb_dim": 64, "embedding_size": 64, "max_length": 512,
    "is_decoder": True, "is_encoder_decoder": False, "attention_type": "original_full", "rotary_dim": 8,
    # mixtures of experts
    "n_routed_experts": 4, "n_shared_experts": 1, "num_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "num_experts_per_token": 2, "moe_num_experts": 4, "moe_topk": 2, "moe_k": 2, "moe_num_shared_experts": 1,
    "moe_shared_expert_intermediate_size": 32, "shared_expert_intermediate_size": 32, "ffn_intermediate_size": 32,
    "expert_ffn_hidden_size": 32, "moe_latent_size": None,
    # latent and indexed attention
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "qk_head_dim": 24,
    "v_head_dim": 12, "index_head_dim": 16, "index_n_heads": 16, "index_topk": 16,
    # state spaces and linear attention
    "mamba_num_heads": 4, "mamba_n_heads": 4, "mamba_head_dim": 32, "mamba_d_head": 32, "ssm_state_size": 16,
    "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8, "chunk_size": 8, "state_size": 16,
    "mamba_dt_rank": 8, "time_step_rank": 8, "mamba_expand": 2, "mamba_d_conv": 4, "n_mamba_heads": 2,
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}  # fmt: skip
"""Given wherever a config, or its text part, has such a field."""

VISION: Fields = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 28,
    "patch_size": 14, "depth": 1, "num_heads": 2, "embed_dim": 32, "mlp_ratio": 2, "num_global_layers": 1,
    "attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
"""The same for a config's vision part."""

_ALTERNATING: Fields = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_LINEAR: Fields = {"layer_types": ["linear_attention", "full_attention"] * 2}
_LATENT: Fields = {"num_key_value_heads": 4, "head_dim": 8}
_QWEN4: Fields = {
    "layer_types": ["linear_attention", "indexed_attention"] * 2, "indexer_n_heads": 2, "indexer_kv_heads": 1,
    "indexer_head_dim": 16, "indexer_budget": 16, "indexer_compress_ratio": 4,
}  # fmt: skip
_SHARING: Fields = {
    "num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3, "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
}  # fmt: skip

RECIPES: Mapping[str, Fields] = {
    "llama": {},
    "gpt2": {},
    "bloom": {},
    "opt": {},
    "qwen3_moe": {},
    "mistral": {},
    "gemma2": {**_ALTERNATING, "query_pre_attn_scalar": 16},
    "gemma3_text": _ALTERNATING,
    "gpt_oss": _ALTERNATING,
    "llama4_text": {"layer_types": ["chunked_attention", "full_attention"] * 2, "no_rope_layers": [1, 0, 1, 0]},
    "gemma3n_text": {**_SHARING, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 6},
    "gemma4_text": {**_SHARING, "global_head_dim": 32, "num_global_key_value_heads": 1},
    "mimo_v2_flash": {
        **_ALTERNATING, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 16,
        "swa_v_head_dim": 12,
    },
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2, "index_n_heads": 2, "index_block_size": 8,
        "index_topk_blocks": 8, "dense_intermediate_size": 96, "shared_intermediate_size": 32,
    },
    "qwen3_next": _LINEAR,
    "falcon_h1": {"mamba_d_ssm": 128},
    "mamba2": {"head_dim": 32, "num_heads": 4, "n_groups": 1, "expand": 2},
    "nemotron_h": {"n_groups": 1, "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "inkling_text": {},
    "deepseek_v4": {"num_key_value_heads": 1},
    "dory": {"n_input_layers": 1, "n_output_layers": 1},
    "phi3": {
        "max_position_embeddings": 128, "original_max_position_embeddings": 32, "sliding_window": None,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
            "original_max_position_embeddings": 32,
        },
    },
    "mamba": {},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
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

OTHERS: Mapping[str, Fields] = {
    "axk1": _LATENT, "deepseek_v2": _LATENT, "glm4_moe_lite": _LATENT, "longcat_flash": _LATENT,
    "minicpm3": _LATENT, "sarvam_mla": _LATENT, "youtu": _LATENT,
    "axk2": _LATENT, "glm_moe_dsa": _LATENT, "hy_v4": _LATENT, "dots3_note_text": _LATENT,
    "dots3_note": {
        "text_config": {**_LATENT, "num_key_value_heads": 4},
        "vision_config": {
            "per_layer_config": {}, "mlp_layer_types": ["dense"], "adapter_in_dim": 32, "adapter_out_dim": 64,
        },
        "audio_config": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "adapter_input_size": 32, "adapter_output_size": 64,
        },
    },
    "bailing_hybrid": {**_LATENT, **_LINEAR}, "kimi_linear": {**_LATENT, **_LINEAR},
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": _LINEAR,
    "cohere_compass_text": {
        "layer_types": ["full_attention"] * 4,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "gemma4": {"text_config": {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "inkling2_loop_text": {"unpadded_vocab_size": VOCABULARY}, "inkling2_text": {"unpadded_vocab_size": VOCABULARY},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm3": {"layer_types": ["conv", "full_attention"] * 2},
    "qwen4_exp": {"text_config": _QWEN4}, "qwen4_exp_text": _QWEN4,
    "reformer": {"axial_pos_shape": [16, 32], "axial_pos_embds_dim": [32, 32]},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"layer_types": ["linear_attention", "hybrid"] * 2, "num_mem_blocks": 1, "hybrid_layer_ids": [1, 3]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""What other types need beyond `BASE`."""
