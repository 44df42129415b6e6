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
    "sliding_window": 8, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    "tie_word_embeddings": False,
}  # fmt: skip
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_inner": 96, "n_positions": 512},
    "bloom": {"n_layer": 4, "n_head": 4},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "qwen3_moe": {},
}
"""The full-attention part of the parity matrix."""


def tiny_model(model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A random causal model of ``model_type`` with 4 layers of width 64 and 128 tokens, in ``eval`` mode.

    Equal arguments give equal weights. Base values are given only where the config has such a field.
    """
    known = AutoConfig.for_model(model_type).to_dict()
    names = set(known) | set(getattr(type(AutoConfig.for_model(model_type)), "attribute_map", {}))
    fields = {name: value for name, value in _BASE.items() if name in names}
    config = AutoConfig.for_model(model_type, **{**fields, **RECIPES.get(model_type, {}), **overrides})
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
