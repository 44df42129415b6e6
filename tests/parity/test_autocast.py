"""State that was computed under torch's autocast is never taken for the model's own, nor the model's own for it."""

from __future__ import annotations

import copy

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState

import ghostcacher
from ghostcacher import GhostCache
from ghostcacher.adapters.calls import CallReader
from ghostcacher.testing.models import random_prompt, tiny_model

PROMPT = random_prompt(40, seed=4)
DTYPES = [torch.bfloat16, torch.float16]


def under(dtype=torch.bfloat16):
    return torch.autocast(torch.get_default_device().type, dtype=dtype)


def same(one, other):
    return all(map(torch.equal, one, other))


@pytest.mark.parametrize("dtype", DTYPES)
def test_under_autocast_a_prompt_runs_cold_and_leaves_nothing(llama, store, with_logits, dtype):
    plain = with_logits(llama, PROMPT)
    with under(dtype):
        expected = with_logits(llama, PROMPT)
        cache = GhostCache(llama, store)
        assert same(with_logits(llama, PROMPT, cache), expected)
    assert not torch.equal(expected[1], plain[1])
    assert cache.report.reason == "bypass: autocast is on"
    store.flush()
    assert all(tier.blocks == 0 for tier in store.stats().tiers)
    cache = GhostCache(llama, store)
    assert same(with_logits(llama, PROMPT, cache), plain)
    assert cache.report.reason == "miss: first seen"


def test_what_the_model_computed_is_not_served_under_autocast(llama, store, with_logits):
    cache = GhostCache(llama, store)
    with_logits(llama, PROMPT, cache)
    store.flush()
    with under():
        expected = with_logits(llama, PROMPT)
        assert same(with_logits(llama, PROMPT, cache), expected)
        assert cache.report.reason == "bypass: autocast is on"
        with ghostcacher.attach(llama, store):
            assert same(with_logits(llama, PROMPT), expected)


def test_a_model_that_is_first_seen_under_autocast_is_served_without(store, with_logits):
    model = tiny_model("llama", seed=6)
    with under():
        cache = GhostCache(model, store)
    plain = with_logits(model, PROMPT)
    with_logits(model, PROMPT, cache)
    store.flush()
    assert [tier.rejected + tier.errors for tier in store.stats().tiers] == [0] * len(store.stats().tiers)
    assert all(tier.blocks for tier in store.stats().tiers)
    cache = GhostCache(model, store)
    sequences, logits = with_logits(model, PROMPT, cache)
    assert cache.report.cached_tokens == 39
    assert torch.equal(sequences, plain[0])
    assert (logits - plain[1]).abs().max() < 1e-5


@pytest.mark.parametrize("width", [1, 20])
def test_steps_under_autocast_are_not_stored(llama, store, width):
    """A loop of the user's own that turns it on after the prompt, and off again."""
    name, later = CallReader(llama).cache_name, random_prompt(60, seed=5)
    cache = GhostCache(llama, store)
    with torch.no_grad():
        llama(PROMPT, **{name: cache}, logits_to_keep=1)
        for step in torch.split(later[:, :40], width, dim=1):
            with under():
                llama(step, **{name: cache}, logits_to_keep=1)
        llama(later[:, 40:], **{name: cache}, logits_to_keep=1)
    del cache
    store.flush()
    said = torch.cat([PROMPT, later], dim=1)[0].tolist()
    assert ghostcacher.lookup(llama, said, store).tokens == PROMPT.shape[1]


@pytest.fixture
def prepared():
    """The model as accelerate prepares it for mixed precision: its forward turns autocast on."""

    def prepare(model, precision):
        AcceleratorState._reset_state(reset_partial_state=True)  # it remembers the process's first precision
        is_cpu = torch.get_default_device().type == "cpu"
        return accelerate.Accelerator(mixed_precision=precision, cpu=is_cpu).prepare(model)

    yield prepare
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_accelerate_prepared_is_another_model(store, with_logits, prepared, dtype):
    plain = tiny_model("llama", seed=7).to(dtype)
    mixed = prepared(copy.deepcopy(plain), "bf16")
    caches = []
    for model in (plain, mixed, plain, mixed):
        expected = with_logits(model, PROMPT)
        caches.append(GhostCache(model, store))
        sequences, logits = with_logits(model, PROMPT, caches[-1])
        assert torch.equal(sequences, expected[0])
        assert (logits - expected[1]).abs().max() < 2e-2
        store.flush()
    assert [cache.report.cached_tokens for cache in caches] == [0, 0, 39, 39]
    assert all(tier.blocks for tier in store.stats().tiers)


def test_a_model_that_is_prepared_after_its_first_prompt_runs_cold(store, with_logits, prepared):
    model = tiny_model("llama", seed=8)
    with_logits(model, PROMPT, GhostCache(model, store))
    store.flush()
    stored = store.stats().tiers[0].stored
    model = prepared(model, "bf16")
    expected = with_logits(model, PROMPT)
    cache = GhostCache(model, store)
    assert same(with_logits(model, PROMPT, cache), expected)
    assert cache.report.reason == "bypass: prepared for mixed precision, or taken back, since it was first looked at"
    store.flush()
    assert store.stats().tiers[0].stored == stored
