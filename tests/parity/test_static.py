"""Static caches under ``attach``: made by ``generate``, by the user, and with compiled decode steps."""

from __future__ import annotations

import pytest
import torch
from transformers import CompileConfig, StaticCache

from ghostcacher import GhostCache, attach
from ghostcacher.adapters.calls import CallReader
from ghostcacher.testing.models import random_prompt, tiny_model

PROMPT = random_prompt(40, seed=5)
SERVED = ["llama", "gpt2", "deepseek_v3", "mistral", "gemma2", "qwen3_next", "mamba2"]


@pytest.fixture(params=SERVED)
def model(request, models):
    return models(request.param)


def donor(shared):
    other = random_prompt(56, seed=9)
    other[:, :shared] = PROMPT[:, :shared]
    other[0, shared] = (PROMPT[0, shared] + 1) % 100 + 2
    return other


@pytest.mark.parametrize("shared", [16, 24])
def test_generate_makes_a_static_cache_that_is_filled(model, memory_store, generate, shared):
    generate(model, donor(shared), GhostCache(model, memory_store, boundaries=[shared]), new=1)
    memory_store.flush()
    expected = generate(model, PROMPT)
    with attach(model, memory_store) as attached:
        out = generate(model, PROMPT, cache_implementation="static")
    assert torch.equal(out, expected)
    assert attached.reports[0].cached_tokens == shared, attached.reports[0]


@pytest.mark.parametrize("recipe", ["llama", "gpt2", "qwen3_next"])
def test_a_static_run_is_stored_for_others(recipe, models, memory_store, generate):
    model = models(recipe)
    expected = generate(model, PROMPT)
    with attach(model, memory_store):
        assert torch.equal(generate(model, PROMPT, cache_implementation="static"), expected)
    memory_store.flush()
    cache = GhostCache(model, memory_store)
    assert torch.equal(generate(model, PROMPT, cache), expected)
    assert cache.report.cached_tokens >= 32


def test_a_users_own_static_cache_used_again_after_a_reset(llama, memory_store, generate):
    name = CallReader(llama).cache_name
    static = StaticCache(config=llama.config, max_cache_len=64)
    prompts = [PROMPT, donor(24)[:, :50], PROMPT]
    expected = [generate(llama, prompt) for prompt in prompts]
    with attach(llama, memory_store) as attached:
        for prompt, answer in zip(prompts, expected, strict=True):
            out = llama.generate(prompt, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(prompt),
                                 **{name: static})  # fmt: skip
            assert torch.equal(out, answer)
            static.reset()
            memory_store.flush()
    assert [report.cached_tokens for report in attached.reports] == [0, 24, 39]


def test_left_padded_rows_in_a_static_cache(llama, memory_store, generate):
    ids = torch.cat([torch.cat([torch.zeros(1, 7, dtype=torch.long), PROMPT[:, :33]], 1), PROMPT])
    mask = (ids != 0).long()
    expected = generate(llama, ids, attention_mask=mask)
    with attach(llama, memory_store) as attached:
        for _ in range(2):
            out = generate(llama, ids, attention_mask=mask, cache_implementation="static")
            assert torch.equal(out, expected)
            memory_store.flush()
    assert attached.reports[-1].cached_tokens >= 32


def test_compiled_decode_steps(memory_store, generate):
    model = tiny_model("llama", seed=4)
    expected = generate(model, PROMPT)
    options = {"cache_implementation": "static", "compile_config": CompileConfig(backend="eager", fullgraph=True)}
    options["compile_config"]._compile_all_devices = True
    with attach(model, memory_store) as attached:
        for _ in range(2):
            assert torch.equal(generate(model, PROMPT, **options), expected)
            memory_store.flush()
    assert [report.cached_tokens for report in attached.reports] == [0, 39]
