"""Cold against warm: injected bytes, then logits, then tokens.

State always comes from a *different* prompt that shares a beginning with the one it serves.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from safetensors.torch import load
from transformers import DynamicCache

from ghostcacher import GhostCache, attach
from ghostcacher.testing.models import FULL_ATTENTION, random_prompt

PROMPT_TOKENS = 40
HITS = {"none": 0, "inside a block": 24, "whole blocks": 32, "all but one": 39}
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 3},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "return sequences": {"num_return_sequences": 2, "do_sample": True},
    "chunks": {"prefill_chunk_size": 16},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.fixture(params=FULL_ATTENTION)
def model(request, models):
    return models(request.param)


@pytest.fixture(params=HITS)
def hit_tokens(request):
    return HITS[request.param]


def donor_of(prompt, hit_tokens):
    """A longer prompt that shares exactly ``hit_tokens`` reusable tokens with ``prompt``."""
    shared = PROMPT_TOKENS if hit_tokens == PROMPT_TOKENS - 1 else hit_tokens
    other = random_prompt(PROMPT_TOKENS + 16, seed=99)
    if shared < PROMPT_TOKENS:
        other[0, shared] = (prompt[0, shared] + 1) % 100 + 2
    other[:, :shared] = prompt[:, :shared]
    return other


def remember(model, store, generate, prompt, hit_tokens):
    if hit_tokens:
        generate(model, donor_of(prompt, hit_tokens), GhostCache(model, store), new=1)
        store.flush()


@pytest.mark.parametrize("mode", MODES)
def test_f56_every_mode_answers_as_a_cold_run(model, store, generate, hit_tokens, mode, with_logits, cold):
    prompt = random_prompt(PROMPT_TOKENS, seed=5)
    options = MODES[mode]
    expected, expected_logits = cold(model, prompt, **options)
    remember(model, store, generate, prompt, hit_tokens)
    cache = GhostCache(model, store)
    tokens, logits = with_logits(model, prompt, cache, **options)
    assert cache.report.cached_tokens >= hit_tokens - (3 if mode == "chunks" else 0)
    assert (logits - expected_logits).abs().max() < 1e-5
    assert torch.equal(tokens, expected)
    warm = GhostCache(model, store)
    again, _ = with_logits(model, prompt, warm, **options)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_attach_serves_code_that_makes_its_own_cache(model, store, generate, hit_tokens, mode, with_logits, cold):
    prompt = random_prompt(PROMPT_TOKENS, seed=6)
    expected, expected_logits = cold(model, prompt, **MODES[mode])
    remember(model, store, generate, prompt, hit_tokens)
    with attach(model, store) as attached:
        tokens, logits = with_logits(model, prompt, None, **MODES[mode])
    assert attached.reports[0].cached_tokens == hit_tokens
    assert (logits - expected_logits).abs().max() < 1e-5
    assert torch.equal(tokens, expected)


def test_injected_bytes_are_the_stored_bytes(model, store, generate, hit_tokens):
    if not hit_tokens:
        pytest.skip("nothing is injected")
    prompt = random_prompt(PROMPT_TOKENS, seed=5)
    remember(model, store, generate, prompt, hit_tokens)
    files = [load(path.read_bytes()) | {"name": path.stem} for path in store.config.directory.rglob("*.safetensors")]
    cache = GhostCache(model, store)
    generate(model, prompt, cache, new=1)
    assert cache.report.cached_tokens == hit_tokens
    found = 0
    for number, layer in enumerate(cache.layers):
        for name, state in (("keys", layer.keys), ("values", layer.values)):
            for start in range(0, hit_tokens, 16):
                end = min(start + 16, hit_tokens)
                piece = state[0, :, start:end].cpu()
                stored = [f[name][number][:, : end - start] for f in files if f[name].shape[2] >= end - start]
                assert any(torch.equal(piece, candidate) for candidate in stored)
                found += 1
    assert found == len(cache.layers) * 2 * -(-hit_tokens // 16)


def test_logits_are_bit_equal_to_a_run_cut_at_the_same_place(model, store, generate, hit_tokens, with_logits):
    if not hit_tokens:
        pytest.skip("nothing is cut")
    prompt = random_prompt(PROMPT_TOKENS, seed=8)
    generate(model, prompt[:, :hit_tokens], GhostCache(model, store), new=1)
    store.flush()
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    stock = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt[:, :hit_tokens], **{name: stock}, use_cache=True)
    _, cut = with_logits(model, prompt, stock)
    cache = GhostCache(model, store)
    _, logits = with_logits(model, prompt, cache)
    assert cache.report.cached_tokens == hit_tokens
    assert torch.equal(logits, cut)


@pytest.mark.parametrize("pads", [(0, 7, 30), (3, 3, 3)])
def test_f54_left_padded_batches(model, store, generate, hit_tokens, pads, with_logits, cold):
    prompt = random_prompt(PROMPT_TOKENS, seed=5)
    ids = torch.cat(
        [torch.cat([torch.zeros(1, pad, dtype=torch.long), prompt[:, : PROMPT_TOKENS - pad]], 1) for pad in pads]
    )
    mask = (ids != 0).long()
    expected, expected_logits = cold(model, ids, attention_mask=mask)
    remember(model, store, generate, prompt, hit_tokens)
    cache = GhostCache(model, store)
    tokens, logits = with_logits(model, ids, cache, attention_mask=mask)
    coldest = min(pad + min(hit_tokens, PROMPT_TOKENS - pad) for pad in pads)
    assert cache.report.cached_tokens == max(0, min(coldest, PROMPT_TOKENS - 1) - min(pads))
    assert (logits - expected_logits).abs().max() < 1e-4
    assert torch.equal(tokens, expected)


def test_assisted_decoding_with_another_model(models, store, generate):
    model, assistant = models("llama"), models("llama", num_hidden_layers=2)
    prompt = random_prompt(PROMPT_TOKENS, seed=5)
    expected = generate(model, prompt, new=12)
    for _ in range(2):
        cache = GhostCache(model, store)
        assert torch.equal(generate(model, prompt, cache, new=12, assistant_model=assistant), expected)
        store.flush()
    assert cache.report.cached_tokens == PROMPT_TOKENS - 1


def test_a_streamer_sees_every_token(llama, store, generate):
    class Tokens:
        def __init__(self):
            self.seen = []

        def put(self, value):
            self.seen += value.reshape(-1).tolist()

        def end(self):
            self.seen.append("end")

    prompt = random_prompt(PROMPT_TOKENS, seed=5)
    for _ in range(2):
        streamer = Tokens()
        out = generate(llama, prompt, GhostCache(llama, store), streamer=streamer)
        assert streamer.seen == [*out[0].tolist(), "end"]
