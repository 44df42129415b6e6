"""Model types: proven, refused, and what is known of them. Measured on transformers 5.17 and 5.24.

Which kinds of state a model has is read off its layers, never off this table.
"""

from __future__ import annotations

from collections.abc import Mapping

PROVEN = frozenset({
    "bloom", "deepseek_v3", "deepseek_v32", "deepseek_v4", "dory", "falcon_h1", "gemma2", "gemma3_text",
    "gemma3n_text", "gemma4_text", "gpt2", "gpt_oss", "inkling_text", "lfm2", "llama", "llama4_text", "mamba2",
    "mimo_v2_flash", "minimax_m3_vl_text", "mistral", "nemotron_h", "opt", "phi3", "qwen3_moe", "qwen3_next",
})  # fmt: skip
"""Exact in tests/parity of this version. Other types are certified by a probe at first use."""

NO_DYNAMIC_CACHE: Mapping[str, str] = {
    "minimax": "it takes no cache but its own",
    "openai-gpt": "it has no cache",
    "reformer": "it takes no cache but its own",
    "rwkv": "its state is a list of its own",
    "xlnet": "its state is a tuple of its own",
    "xlstm": "it takes no cache but its own",
}
"""Types that fail with any subclass of DynamicCache: a GhostCache cannot be made for them."""

REFUSED: Mapping[str, str] = {
    "big_bird": "positions ignore the past below transformers 5.24",
    "blt": "its patches are not a function of the prefix",
    "cpmant": "it feeds the whole prompt whatever the cache holds",
    "gemma4_assistant": "it drafts for another model and needs that model's state",
    "gemma4_unified_assistant": "it drafts for another model and needs that model's state",
    "git": "one remaining token is answered wrongly below transformers 5.24",
    "inkling_text": "its cache counts the window instead of the tokens below transformers 5.24",
    "megatron-bert": "positions ignore the past below transformers 5.24",
    "moshi": "its prefill mask is not that of its cache",
    "musicgen": "it needs another modality",
    "musicgen_melody": "it needs another modality",
    "paligemma": "the prompt is attended to in both directions: a prefix is not a function of the prefix",
    "prophetnet": "it uses a cache one token at a time only",
    "recurrent_gemma": "its recurrent state lies in the modules, not in the cache",
    "rembert": "positions ignore the past below transformers 5.24",
    "roformer": "positions ignore the past below transformers 5.24",
    "whisper": "it needs another modality",
    "xlm": "a mask token is appended to the input",
}

FIXED_IN: Mapping[str, tuple[int, int]] = {
    "big_bird": (5, 24),
    "git": (5, 24),
    "inkling_text": (5, 24),
    "megatron-bert": (5, 24),
    "rembert": (5, 24),
    "roformer": (5, 24),
}
"""First transformers version in which a refused type became right."""

NOT_IN_PADDED_BATCHES = frozenset({"deepseek_v4", "minimax_m3_vl_text"})
"""Proven types whose padded rows differ from unpadded ones even without a cache: the padding shifts their blocks."""

WITH_IMAGES = frozenset({
    "gemma3", "gemma4", "idefics3", "internvl", "llava", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_vl", "smolvlm",
})  # fmt: skip
"""Types whose prompts with images are exact in tests/parity; those of other types run cold."""

ONE_AT_A_TIME = frozenset({"falcon_mamba", "jamba", "mamba", "zamba"})
"""Types whose scan takes no initial state: after a prefix, more than one token at once silently starts from zero."""

TOKENS_LEFT: Mapping[str, int] = {"nemotron_h": 2, "zamba2": 2}
"""Tokens that must be computed at once, where one is not enough: the decode path rounds unlike the prefill path."""


def refusal(model_type: str, version: tuple[int, int]) -> str | None:
    """Why prompts of this type run cold on this transformers version, or None."""
    if model_type in FIXED_IN and version >= FIXED_IN[model_type]:
        return None
    return REFUSED.get(model_type)
