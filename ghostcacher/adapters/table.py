"""Model types: proven, refused, and what is known of them. Measured on transformers 5.17 and 5.24."""

from __future__ import annotations

from collections.abc import Mapping

PROVEN = frozenset({"bloom", "gpt2", "llama", "opt", "qwen3_moe"})
"""Exact in tests/parity of this version. Other full-attention types are certified by a probe at first use."""

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
    "git": "one remaining token is answered wrongly below transformers 5.24",
    "megatron-bert": "positions ignore the past below transformers 5.24",
    "moshi": "its prefill mask is not that of its cache",
    "musicgen": "it needs another modality",
    "musicgen_melody": "it needs another modality",
    "paligemma": "the prompt is attended to in both directions: a prefix is not a function of the prefix",
    "prophetnet": "it uses a cache one token at a time only",
    "rembert": "positions ignore the past below transformers 5.24",
    "roformer": "positions ignore the past below transformers 5.24",
    "whisper": "it needs another modality",
    "xlm": "a mask token is appended to the input",
}

FIXED_IN: Mapping[str, tuple[int, int]] = {
    "big_bird": (5, 24),
    "git": (5, 24),
    "megatron-bert": (5, 24),
    "rembert": (5, 24),
    "roformer": (5, 24),
}
"""First transformers version in which a refused type became right."""

NOT_IN_PADDED_BATCHES = frozenset({
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart",
    "roformer", "trocr",
})  # fmt: skip
"""Types that take positions from the past length, not from the mask: a padded row differs even without a cache."""

LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})
"""Rope types whose keys depend on the total length of the prompt."""


def refusal(model_type: str, version: tuple[int, int]) -> str | None:
    """Why prompts of this type run cold on this transformers version, or None."""
    if model_type in FIXED_IN and version >= FIXED_IN[model_type]:
        return None
    return REFUSED.get(model_type)
