"""Rotary frequencies that depend on how long the sequence is: what is stored short must not be used long."""

from __future__ import annotations

import pytest
import torch

from ghostcacher import GhostCache
from ghostcacher.testing.models import random_prompt, tiny_model

LIMIT = 32
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "factor": 2.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
    "original_max_position_embeddings": LIMIT,
}  # fmt: skip


@pytest.fixture
def longrope():
    return tiny_model("llama", rope_parameters=LONGROPE, max_position_embeddings=128)


@pytest.fixture
def dynamic():
    return tiny_model("llama with dynamic rope")


def warm(model, store, generate, prompt, new=1):
    cache = GhostCache(model, store)
    out = generate(model, prompt, cache, new=new)
    report = cache.report
    del cache
    store.flush()
    return out, report


PROMPT = random_prompt(64, seed=5)


@pytest.mark.parametrize(("stored", "asked", "reused"), [(24, 30, 24), (24, 64, 0), (40, 64, 40), (64, 30, 0)])
def test_f17_longrope_reuses_within_its_regime_only(longrope, store, generate, stored, asked, reused):
    warm(longrope, store, generate, torch.cat([PROMPT[:, :stored], random_prompt(3, seed=9)], 1))
    expected = generate(longrope, PROMPT[:, :asked], new=1)
    out, report = warm(longrope, store, generate, PROMPT[:, :asked])
    assert report.cached_tokens == min(reused, asked - 1)
    assert torch.equal(out, expected)


def test_tokens_generated_beyond_the_switch_are_not_stored(longrope, store, generate):
    """They were computed after keys of the other regime: no prompt that long would have those."""
    out, _ = warm(longrope, store, generate, PROMPT[:, :30], new=40)
    longer = torch.cat([out, random_prompt(3, seed=2)], 1)
    expected = generate(longrope, longer)
    answer, report = warm(longrope, store, generate, longer, new=8)
    assert report.cached_tokens == 0
    assert torch.equal(answer, expected)


def test_a_regime_change_is_no_change_of_weights(longrope, store, generate):
    """The frequencies in use are a buffer of the model; which ones a prompt gets is in its namespace."""
    warm(longrope, store, generate, PROMPT[:, :24])
    warm(longrope, store, generate, PROMPT)
    assert warm(longrope, store, generate, PROMPT[:, :30])[1].cached_tokens == 24
    assert warm(longrope, store, generate, PROMPT)[1].cached_tokens == 63


def test_dynamic_rope_is_served_up_to_its_trained_length(dynamic, store, generate):
    warm(dynamic, store, generate, torch.cat([PROMPT[:, :24], random_prompt(3, seed=9)], 1))
    expected = generate(dynamic, PROMPT[:, :30], new=1)
    out, report = warm(dynamic, store, generate, PROMPT[:, :30])
    assert report.cached_tokens == 24
    assert torch.equal(out, expected)


def test_f17_dynamic_rope_runs_cold_beyond(dynamic, store, generate):
    """Every run there leaves other frequencies behind, so the same history is given to a twin without a cache."""
    twin = tiny_model("llama with dynamic rope")
    history = [PROMPT[:, :8], PROMPT, PROMPT, PROMPT[:, :24], PROMPT[:, :40]]
    for prompt in history:
        out, report = warm(dynamic, store, generate, prompt)
        assert torch.equal(out, generate(twin, prompt, new=1))
        if prompt.shape[1] >= LIMIT:
            assert "depends on earlier prompts" in report.reason
