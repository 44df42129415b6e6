"""Every kind of layer state against a cold run: logits, then tokens, in every way of generating.

What is put back always comes from a *different, longer* prompt that shares only a beginning.
"""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from ghostcacher import GhostCache, UnsupportedModelError, attach
from ghostcacher.adapters.base import ModelAdapter, base_module
from ghostcacher.adapters.capture import Row, RowCapture
from ghostcacher.adapters.probe import run
from ghostcacher.hooks import hooks_of
from ghostcacher.keys import Namespace, PrefixChain, unpack_tokens
from ghostcacher.testing.models import FULL_ATTENTION, RECIPES, random_prompt, tiny_model

PROMPT_TOKENS = 40
BLOCK_TOKENS = 16
LEAVES_TWO = {"nemotron_h"}
DROPS_THE_CACHE = {"phi3"}
REFUSED = {"minimax", "recurrent_gemma"}
OTHERWISE_TESTED = {"llama with dynamic rope"}
ONE_BY_ONE = {"mamba", "jamba"}
NO_PADS = {"deepseek_v4", "minimax_m3_vl_text"}
SERVED = sorted(RECIPES.keys() - REFUSED - OTHERWISE_TESTED)
HITS = {"none": 0, "inside a block": 24, "a whole block": 32, "all but one": 39}
MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "return sequences": {"num_return_sequences": 2, "do_sample": True},
}


@pytest.fixture(params=SERVED)
def recipe(request):
    return request.param


@pytest.fixture
def model(recipe, models):
    try:
        found = models(recipe)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        pytest.skip(f"this transformers has no {recipe}: {str(error)[:60]}")
    adapter = ModelAdapter(base_module(found))
    if adapter.refusal:
        pytest.skip(adapter.refusal)
    return found


@pytest.fixture(params=HITS)
def hit_tokens(request):
    return HITS[request.param]


def remember(model, store, generate, prompt, shared):
    """Store a longer prompt that shares exactly ``shared`` tokens with ``prompt``."""
    if not shared:
        return
    recipe_leaves = 2 if model.config.model_type in LEAVES_TWO else 1
    donor = random_prompt(PROMPT_TOKENS + 16, seed=99)
    donor[:, :shared] = prompt[:, :shared]
    if shared < PROMPT_TOKENS - 1:
        donor[0, shared] = (prompt[0, shared] + 1) % 100 + 2
    generate(model, donor, GhostCache(model, store, boundaries=[min(shared, PROMPT_TOKENS - recipe_leaves)]), new=1)
    store.flush()


@pytest.mark.parametrize("mode", MODES)
def test_warm_answers_as_cold(recipe, model, store, generate, hit_tokens, mode, with_logits, cold):
    prompt = random_prompt(PROMPT_TOKENS, seed=5)
    expected, cold_logits = cold(model, prompt, **MODES[mode])
    remember(model, store, generate, prompt, hit_tokens)
    cache = GhostCache(model, store)
    tokens, logits = with_logits(model, prompt, cache, **MODES[mode])
    assert cache.report.cached_tokens in expected_hits(recipe, hit_tokens), cache.report
    assert (logits - cold_logits).abs().max() < (1e-5 if recipe in FULL_ATTENTION else 1e-4)
    assert torch.equal(tokens, expected)
    warm = GhostCache(model, store)
    again, _ = with_logits(model, prompt, warm, **MODES[mode])
    assert warm.report.cached_tokens > 0 or recipe in DROPS_THE_CACHE | ONE_BY_ONE
    assert torch.equal(again, expected)


def expected_hits(recipe, hit_tokens):
    """What may be reused when ``hit_tokens`` are known: phi3 itself drops the cache of such a prompt."""
    if recipe in DROPS_THE_CACHE:
        return {0}
    if recipe in ONE_BY_ONE:
        return {0, hit_tokens}
    return {min(hit_tokens, PROMPT_TOKENS - 2) if recipe in LEAVES_TWO else hit_tokens}


@pytest.mark.parametrize("pads", [(0, 7), (3, 3)])
def test_padded_batches_answer_as_cold(recipe, model, store, generate, hit_tokens, pads, with_logits, cold):
    if recipe in NO_PADS:
        pytest.skip("its padded rows depend on the padding")
    prompt = random_prompt(PROMPT_TOKENS, seed=5)
    rows = [torch.cat([torch.zeros(1, n, dtype=torch.long), prompt[:, : PROMPT_TOKENS - n]], 1) for n in pads]
    ids = torch.cat(rows)
    mask = (ids != 0).long()
    expected, cold_logits = cold(model, ids, attention_mask=mask)
    remember(model, store, generate, prompt, hit_tokens)
    cache = GhostCache(model, store)
    tokens, logits = with_logits(model, ids, cache, attention_mask=mask)
    assert (logits - cold_logits).abs().max() < 1e-4
    assert torch.equal(tokens, expected)
    if hit_tokens < min(PROMPT_TOKENS - n for n in pads) and not (has_states(model) and len(set(pads)) > 1):
        assert cache.report.cached_tokens in expected_hits(recipe, hit_tokens), cache.report


def test_rows_selected_and_repeated_by_hand(recipe, model, store):
    """What transformers' own methods of these names leave undone on linear and compressed layers."""
    prompt = random_prompt(24, seed=5, rows=2)
    cache = GhostCache(model, store)
    run(model, prompt, cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices([3, 0])
    cache.batch_select_indices(torch.tensor([True, True]))
    following = random_prompt(2, seed=7, rows=2)
    for step in range(2):
        stepped = run(model, following[:, step : step + 1], cache, 24 + step)
    whole = torch.cat([prompt.flip(0), following], dim=1)
    cold = run(model, whole, DynamicCache(config=model.config))
    tolerance = 5e-3 if model.config.model_type in LEAVES_TWO else 1e-4
    torch.testing.assert_close(stepped, cold, atol=tolerance, rtol=0)


def has_states(model):
    adapter = ModelAdapter(base_module(model))
    adapter.prepare(model)
    return adapter.has_states


def test_attach_answers_as_cold(recipe, model, store, generate, hit_tokens, with_logits, cold):
    prompt = random_prompt(PROMPT_TOKENS, seed=6)
    expected, cold_logits = cold(model, prompt)
    remember(model, store, generate, prompt, hit_tokens)
    with attach(model, store) as attached:
        tokens, logits = with_logits(model, prompt, None)
        beams, _ = with_logits(model, prompt, None, num_beams=3, new=40)
    assert (logits - cold_logits).abs().max() < 1e-4
    assert torch.equal(tokens, expected)
    if recipe not in DROPS_THE_CACHE:
        assert attached.reports[0].cached_tokens in expected_hits(recipe, hit_tokens), attached.reports[0]
    assert torch.equal(beams, cold(model, prompt, num_beams=3, new=40)[0])


def test_a_chat_answers_as_cold(recipe, model, store, generate):
    text = random_prompt(30, seed=0)
    for turn in range(3):
        cache = GhostCache(model, store)
        out = generate(model, text, cache, new=20)
        assert torch.equal(out, generate(model, text, new=20))
        if turn and recipe not in ONE_BY_ONE | DROPS_THE_CACHE:
            # what nemotron_h decodes rounds unlike its prefill: its answers are not stored
            answer = 20 if recipe in LEAVES_TWO else 0
            assert cache.report.cached_tokens >= text.shape[1] - 10 - answer - 17, cache.report
        del cache
        store.flush()
        text = torch.cat([out, random_prompt(10, seed=turn + 10)], 1)


def test_a_cache_used_twice_answers_as_cold(recipe, model, memory_store, generate):
    first = random_prompt(PROMPT_TOKENS, seed=1)
    cache = GhostCache(model, memory_store)
    out = generate(model, first, cache)
    for second in (torch.cat([out, random_prompt(9, seed=3)], 1), first, first[:, :13], random_prompt(70, seed=4)):
        again = generate(model, second, cache)
        assert torch.equal(again, generate(model, second))


def test_chunks_answer_as_cold(recipe, model, store, generate, hit_tokens, with_logits, cold):
    if recipe in {"mamba", "jamba", "mamba2", "phi3"}:
        pytest.skip("transformers itself answers this type otherwise, or not at all, when it prefills in chunks")
    prompt = random_prompt(PROMPT_TOKENS, seed=5)
    expected, cold_logits = cold(model, prompt)
    remember(model, store, generate, prompt, hit_tokens)
    cache = GhostCache(model, store)
    tokens, logits = with_logits(model, prompt, cache, prefill_chunk_size=16)
    if not has_states(model):
        # each chunk leaves one token to compute
        assert cache.report.cached_tokens >= hit_tokens - 3
    assert (logits - cold_logits).abs().max() < 1e-4
    assert torch.equal(tokens, expected)


def test_prompt_lookup_answers_as_cold(recipe, model, store, generate):
    """Candidates are rejected by cropping: windows and convolutional inputs go back too."""
    pattern = random_prompt(6, seed=5)
    prompt = torch.cat([pattern] * 6, 1)
    try:
        expected = generate(model, prompt, new=12, prompt_lookup_num_tokens=3)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        pytest.skip(f"transformers refuses: {str(error)[:60]}")
    for _ in range(2):
        cache = GhostCache(model, store)
        assert torch.equal(generate(model, prompt, cache, new=12, prompt_lookup_num_tokens=3), expected)
        report = cache.report
        del cache
        store.flush()
    assert report.cached_tokens > 0 or recipe in DROPS_THE_CACHE


def test_what_is_stored_is_what_a_cold_run_computes(recipe, model, memory_store, generate):
    """Every block and snapshot, recomputed from its token ids: whoever generated it, in whatever way."""
    prompt = random_prompt(PROMPT_TOKENS, seed=5)
    with attach(model, memory_store):
        generate(model, prompt, num_beams=3, new=40)
        torch.manual_seed(3)
        generate(model, prompt, num_return_sequences=2, do_sample=True, new=20)
    generate(model, prompt, GhostCache(model, memory_store, boundaries=[24]), new=20)
    memory_store.flush()
    shape = hooks_of(base_module(model)).adapter.shape
    tier = memory_store.tiers[0]
    keys = list(tier.entries())
    assert keys or recipe in DROPS_THE_CACHE
    for key in keys:
        tokens, before = key.tokens, tier.index.get(key.parent)
        while before is not None:
            tokens, before = before.key.tokens + tokens, tier.index.get(before.key.parent)
        ids = torch.tensor([unpack_tokens(tokens)])
        cache = DynamicCache(config=model.config)
        cache.layers[:] = shape.blank()
        run(model, ids, cache)
        state = shape.state_of(cache.layers)
        taken = {key.end: state.snapshot()} if key.is_snapshot else {}
        chain = PrefixChain(Namespace(key.namespace), tokens, BLOCK_TOKENS)
        capture = RowCapture.of(state.frozen(), shape.layout, 0, Row(0, chain), (), key.end, snapshots=taken)
        for stored, computed in zip(tier.get(key).tensors, capture.block(key).tensors, strict=True):
            assert torch.allclose(stored.cpu(), computed.cpu(), rtol=1e-3, atol=1e-3), (
                key.is_snapshot,
                key.start,
                key.end,
            )


@pytest.mark.parametrize("recipe", sorted(REFUSED))
def test_refused_types_run_cold_and_right(recipe, store, generate):
    try:
        model = tiny_model(recipe)
    except ValueError as error:
        pytest.skip(str(error))
    prompt = random_prompt(PROMPT_TOKENS, seed=5)
    expected = generate(model, prompt)
    if recipe == "minimax":
        with pytest.raises(UnsupportedModelError, match="cannot be given a GhostCache: it takes no cache but its own"):
            GhostCache(model, store)
        return
    caches = [GhostCache(model, store) for _ in range(2)]
    for cache in caches:
        assert torch.equal(generate(model, prompt, cache), expected)
        assert cache.report.reason.startswith("bypass: ")


@pytest.mark.parametrize("recipe", sorted(ONE_BY_ONE))
@pytest.mark.parametrize("suffix_tokens", [1, 9, 30])
def test_short_suffixes_go_in_one_at_a_time_and_long_ones_run_cold(
    recipe, model, store, generate, suffix_tokens, with_logits
):
    """Their scan takes no initial state: more than one token at once would silently start from zero."""
    shared = random_prompt(150, seed=1)
    generate(model, torch.cat([shared, random_prompt(3, seed=2)], 1), GhostCache(model, store, boundaries=[150]), new=1)
    store.flush()
    prompt = torch.cat([shared, random_prompt(suffix_tokens, seed=3)], 1)
    expected, cold_logits = with_logits(model, prompt, None)
    cache = GhostCache(model, store)
    tokens, logits = with_logits(model, prompt, cache)
    assert cache.report.cached_tokens == (150 if suffix_tokens < 20 else 0)
    assert (logits - cold_logits).abs().max() < 1e-4
    assert torch.equal(tokens, expected)
