"""Loops of the caller's own: what is given after the prompt must be what the prompt's identity says, or is not kept."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from ghostcacher import GhostCache, attach
from ghostcacher.adapters.calls import CallReader
from ghostcacher.adapters.positions import follow
from ghostcacher.testing.models import random_prompt, tiny_model

PROMPT = random_prompt(40, seed=1)
LATER = random_prompt(40, seed=2)


def step(model, ids, cache, begin=None, **given):
    """Last logits of one forward; positions are given if ``begin`` is."""
    reader = CallReader(model)
    if begin is not None:
        given["position_ids"] = torch.arange(begin, begin + ids.shape[1])[None]
    with torch.no_grad():
        return model(
            ids, **{reader.cache_name: cache}, use_cache=True, logits_to_keep=1, return_dict=True, **given
        ).logits


def assert_clean(store, whole, model):
    """A new prompt with these tokens must be answered as cold, whatever was stored of the loop."""
    store.flush()
    prompt = torch.cat([whole, random_prompt(5, seed=9)], 1)
    cold = step(model, prompt, DynamicCache(config=model.config), 0)
    cache = GhostCache(model, store)
    torch.testing.assert_close(step(model, prompt, cache, 0), cold, atol=1e-4, rtol=0)
    return cache.report.cached_tokens


@pytest.mark.parametrize("door", ["own", "attach"])
@pytest.mark.parametrize("width", [1, 20])
def test_plain_steps_are_stored(door, width, memory_store):
    model = tiny_model("llama", seed=3)
    with attach(model, memory_store):
        cache = GhostCache(model, memory_store) if door == "own" else DynamicCache(config=model.config)
        step(model, PROMPT, cache, 0)
        for begin in range(0, 40, width):
            step(model, LATER[:, begin : begin + width], cache, 40 + begin)
        del cache
    assert assert_clean(memory_store, torch.cat([PROMPT, LATER], 1), model) >= 80 - 16


@pytest.mark.parametrize(("width", "steps"), [(1, 40), (1, 5), (20, 2)])
def test_weights_that_change_between_steps(width, steps, memory_store):
    model = tiny_model("llama", seed=3)
    weight = model.model.layers[0].self_attn.k_proj.weight.data
    kept = weight.clone()
    with attach(model, memory_store):
        cache = DynamicCache(config=model.config)
        step(model, PROMPT, cache, 0)
        weight.mul_(1.5)
        for begin in range(0, steps * width, width):
            step(model, LATER[:, begin : begin + width], cache, 40 + begin)
        del cache
    weight.copy_(kept)
    assert assert_clean(memory_store, torch.cat([PROMPT, LATER], 1), model) == 40


@pytest.mark.parametrize("width", [1, 20])
@pytest.mark.parametrize("shift", [1, 100])
def test_custom_positions_after_the_prompt(width, shift, memory_store):
    model = tiny_model("llama", seed=3)
    with attach(model, memory_store):
        cache = DynamicCache(config=model.config)
        step(model, PROMPT, cache, 0)
        for begin in range(0, 40, width):
            step(model, LATER[:, begin : begin + width], cache, 40 + begin + shift)
        del cache
    assert assert_clean(memory_store, torch.cat([PROMPT, LATER], 1), model) == 40


@pytest.mark.parametrize("width", [1, 4])
def test_embeddings_between_steps(width, memory_store):
    model = tiny_model("llama", seed=3)
    embeds = model.get_input_embeddings()(LATER[:, :width]).detach()

    def loop():
        cache = DynamicCache(config=model.config)
        found = [step(model, PROMPT, cache, 0), step(model, None, cache, inputs_embeds=embeds)]
        return [*found, step(model, LATER[:, width:], cache)]

    expected = loop()
    with attach(model, memory_store):
        found = loop()
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, atol=1e-4, rtol=0)
    assert assert_clean(memory_store, torch.cat([PROMPT, LATER], 1), model) == 40


@pytest.mark.parametrize("width", [1, 20])
def test_token_types_after_the_prompt(width, memory_store):
    model = tiny_model("bert", seed=3)
    whole = torch.cat([PROMPT, LATER], 1)
    with attach(model, memory_store):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            reader = CallReader(model)
            given = {reader.cache_name: cache, "use_cache": True, "return_dict": True, "logits_to_keep": 1}
            model(PROMPT, token_type_ids=torch.zeros_like(PROMPT), **given)
            for begin in range(0, 40, width):
                ids = LATER[:, begin : begin + width]
                model(ids, token_type_ids=torch.ones_like(ids), **given)
        del cache
    memory_store.flush()
    prompt = torch.cat([whole, random_prompt(5, seed=9)], 1)
    cache = GhostCache(model, memory_store)
    with torch.no_grad():
        cold = model(prompt, use_cache=True, return_dict=True).logits[:, -1:]
        warm = model(prompt, **{**given, reader.cache_name: cache}).logits
    torch.testing.assert_close(warm, cold, atol=1e-4, rtol=0)
    assert cache.report.cached_tokens == 40


def test_padding_without_positions_is_not_served(memory_store):
    """Llama then counts columns, padding included."""
    model = tiny_model("llama", seed=3)
    step(model, PROMPT, GhostCache(model, memory_store), 0)
    memory_store.flush()
    ids = torch.cat([torch.zeros((1, 5), dtype=torch.long), PROMPT], 1)
    mask = (torch.arange(45)[None] >= 5).long()
    cold = step(model, ids, DynamicCache(config=model.config), attention_mask=mask)
    cache = GhostCache(model, memory_store)
    torch.testing.assert_close(step(model, ids, cache, attention_mask=mask), cold, atol=1e-4, rtol=0)
    assert cache.report.reason == "bypass: padding without position_ids"


@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 1, 1), (4, 2, 1)])
def test_positions_of_another_shape_than_the_prompts(shape, memory_store):
    """Whatever the model makes of them, asking whether they follow must not fail, and only what follows is stored."""
    last = torch.tensor([[[39], [39]]])
    assert bool(follow(torch.full(shape, 40), last)) == (shape != (1,))
    assert not follow(torch.full(shape, 41), last)
    four = last[:, :1].expand(4, 1, 1).clone()
    four[1:] = 30
    assert not follow(torch.full((1, 1), 40), four)
    assert not follow(torch.full((3, 1, 1), 40), four)
    model = tiny_model("llama", seed=3)
    with attach(model, memory_store):
        cache = DynamicCache(config=model.config)
        step(model, PROMPT.repeat(2, 1), cache)
        for number in range(20):
            step(model, LATER[:, number : number + 1].repeat(2, 1), cache, 40 + number)
        del cache
    assert assert_clean(memory_store, PROMPT, model) == 40
