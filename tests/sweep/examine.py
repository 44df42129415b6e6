"""One model type: built tiny, stored by one prompt, put back for another, compared with a cold run."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import ghostcacher
from ghostcacher import GhostCache
from ghostcacher.adapters import table
from ghostcacher.adapters.identity import TRANSFORMERS_VERSION
from ghostcacher.support import Support, supported
from ghostcacher.testing.models import random_prompt, tiny_config, tiny_model

PROMPT_TOKENS = 176
CUT_TOKENS = 160
NEW_TOKENS = 12
LIMIT_PARAMETERS = 500_000_000
PLAIN = {"phi3": {"max_position_embeddings": 512, "original_max_position_embeddings": 512, "rope_parameters": None}}
"""Instead of a recipe that the model's own ``prepare_inputs_for_generation`` drops the cache for."""
TOLERANCE = 1e-3
CAUSAL_TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of one type: ``outcome`` is ``exact``, ``wrong``, ``unused`` (nothing was reused) or ``refused``."""

    support: Support
    outcome: str
    reused_tokens: int = 0
    difference: float = 0.0
    detail: str = ""


class NotBuiltError(Exception):
    """No tiny model of this type can be made here; the message says why."""


def examine(model_type: str, directory: Path) -> Finding:
    """Build, store, reuse, compare. Raises NotBuiltError if there is no tiny model of this type."""
    reason = table.NO_DYNAMIC_CACHE.get(model_type) or table.refusal(model_type, TRANSFORMERS_VERSION)
    if reason:
        return Finding(Support(model_type, (), "none", "refused", reason), "refused")
    model = _built(model_type)
    found = supported(model)
    if found.status == "refused":
        return Finding(found, "refused")
    with ghostcacher.open_store(directory, memory=None, block_tokens=32) as store:
        return _compared(model, found, store)


def _built(model_type: str) -> Any:
    try:
        config = tiny_config(model_type, **PLAIN.get(model_type, {}))
        with torch.device("meta"):
            parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        is_small = parameters <= LIMIT_PARAMETERS
        model = tiny_model(model_type, **PLAIN.get(model_type, {})) if is_small else None
        if model is not None:
            _generated(model, random_prompt(PROMPT_TOKENS, seed=1), None)
    except Exception as error:
        raise NotBuiltError(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}") from error
    if model is None:
        raise NotBuiltError(f"its smallest config has {parameters / 1e6:,.0f} million parameters")
    return model


def _compared(model: Any, found: Support, store: ghostcacher.TierStack) -> Finding:
    """Slices and snapshots come from a longer prompt that shares the first 160 tokens only."""
    prompt, donor = random_prompt(PROMPT_TOKENS, seed=1), random_prompt(PROMPT_TOKENS + 16, seed=2)
    donor[:, :CUT_TOKENS] = prompt[:, :CUT_TOKENS]
    expected, cold = _generated(model, prompt, None)
    _generated(model, donor, GhostCache(model, store, boundaries=[CUT_TOKENS]))
    store.flush()
    worst, reused, is_equal = 0.0, 0, True
    reports = []
    for _ in range(2):
        cache = GhostCache(model, store)
        tokens, logits = _generated(model, prompt, cache)
        reports.append(cache.report)
        reused = max(reused, cache.report.cached_tokens)
        worst = max(worst, float((logits - cold).abs().max()))
        is_equal = is_equal and torch.equal(tokens, expected)
        del cache
        store.flush()
    outcome = "wrong" if not is_equal or worst > TOLERANCE else "exact" if reused else "unused"
    return Finding(found, outcome, reused, worst, "" if reused else reports[-1].reason)


def _generated(model: Any, prompt: torch.Tensor, cache: GhostCache | None) -> tuple[torch.Tensor, torch.Tensor]:
    names = inspect.signature(model.forward).parameters
    name = next((name for name in ("cache", "past_key_values", "cache_params") if name in names), "past_key_values")
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, do_sample=False,
        use_cache=True, output_logits=True, return_dict_in_generate=True, **({} if cache is None else {name: cache}),
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits)


def examine_all(directory: Path) -> Iterator[tuple[str, Finding | NotBuiltError]]:
    """Every type in turn."""
    for number, model_type in enumerate(CAUSAL_TYPES):
        try:
            yield model_type, examine(model_type, directory / str(number))
        except NotBuiltError as error:
            yield model_type, error
