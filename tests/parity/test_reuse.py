"""One cache object used again, chats, and prompts that leave a stored one anywhere."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import threading
import time

import pytest
import torch
from transformers import DynamicCache

import ghostcacher
from ghostcacher import GhostCache, attach
from ghostcacher.adapters import base
from ghostcacher.adapters.calls import CallReader
from ghostcacher.testing.models import FULL_ATTENTION, random_prompt, tiny_model


@pytest.fixture(params=FULL_ATTENTION)
def model(request, models):
    return models(request.param)


SECOND_PROMPTS = {
    "the grown conversation": lambda first, out: torch.cat([out, random_prompt(9, seed=3)], 1),
    "the same prompt again": lambda first, out: first,
    "differs in the middle": lambda first, out: torch.cat([first[:, :20], random_prompt(20, seed=4)], 1),
    "as long as what is cached": lambda first, out: random_prompt(out.shape[1] - 1, seed=5),
    "shorter": lambda first, out: first[:, :13],
    "one token": lambda first, out: first[:, :1],
    "longer and different": lambda first, out: random_prompt(90, seed=6),
}


@pytest.mark.parametrize("second", SECOND_PROMPTS)
def test_a_cache_used_twice_is_right(model, store, generate, second):
    first = random_prompt(40, seed=1)
    cache = GhostCache(model, store)
    out = generate(model, first, cache)
    prompt = SECOND_PROMPTS[second](first, out)
    assert torch.equal(generate(model, prompt, cache), generate(model, prompt))


def test_only_the_new_tokens_with_a_full_mask(llama, store, generate):
    first = random_prompt(40, seed=1)
    cache = GhostCache(llama, store)
    out = generate(llama, first, cache)
    more = random_prompt(9, seed=3)
    whole = torch.cat([out, more], 1)
    expected = generate(llama, whole)[:, whole.shape[1] :]
    last = torch.cat([out[:, -1:], more], 1)
    answer = generate(llama, last, cache, attention_mask=torch.ones_like(whole))
    assert torch.equal(answer[:, last.shape[1] :], expected)


def test_a_live_cache_keeps_what_the_next_prompt_shares(llama, memory_store, generate):
    cache = GhostCache(llama, memory_store)
    out = generate(llama, random_prompt(40, seed=1), cache)
    generate(llama, torch.cat([out, random_prompt(9, seed=3)], 1), cache)
    assert cache.report.cached_tokens == 47
    assert "live" in cache.report.tier


@pytest.mark.parametrize("turns", [4])
def test_the_next_turn_of_a_chat_finds_its_history(model, store, generate, turns):
    text = random_prompt(30, seed=0)
    for turn in range(turns):
        cache = GhostCache(model, store)
        out = generate(model, text, cache, new=20)
        assert torch.equal(out, generate(model, text, new=20))
        if turn:
            # all but what the last answer's last token and this turn's question add
            assert cache.report.cached_tokens >= text.shape[1] - 11 - 16
        del cache
        store.flush()
        text = torch.cat([out, random_prompt(10, seed=turn + 10)], 1)


def test_a_chat_keeps_no_more_than_its_state(llama, store, generate):
    text = random_prompt(30, seed=0)
    for turn in range(6):
        cache = GhostCache(llama, store)
        text = torch.cat([generate(llama, text, cache, new=20), random_prompt(10, seed=turn)], 1)
        del cache
    store.flush()
    stats = store.stats().tiers[0]
    assert stats.blocks == -(-(text.shape[1] - 11) // 16)


def test_decoded_tokens_are_stored_while_generating(llama, store, generate):
    """A process that dies mid-answer loses at most 16 tokens."""
    cache = GhostCache(llama, store)
    out = generate(llama, random_prompt(40, seed=1), cache, new=40)
    store.flush()
    other = GhostCache(llama, store)
    generate(llama, torch.cat([out, random_prompt(3, seed=2)], 1), other)
    assert other.report.cached_tokens >= 80 - 1 - 16
    assert cache is not other


@pytest.mark.parametrize("leaves_at", [1, 15, 16, 17, 31, 47, 48, 63])
def test_every_shared_token_is_reused(llama, store, generate, leaves_at):
    stored = random_prompt(64, seed=1)
    generate(llama, stored, GhostCache(llama, store), new=1)
    store.flush()
    prompt = random_prompt(80, seed=2)
    prompt[:, :leaves_at] = stored[:, :leaves_at]
    prompt[0, leaves_at] = (stored[0, leaves_at] + 1) % 100 + 2
    cache = GhostCache(llama, store)
    assert torch.equal(generate(llama, prompt, cache), generate(llama, prompt))
    assert cache.report.cached_tokens == leaves_at


def test_a_cache_works_with_use_cache_false(llama, store, generate):
    prompt = random_prompt(40, seed=1)
    expected = generate(llama, prompt)
    cache = GhostCache(llama, store)
    assert torch.equal(generate(llama, prompt, cache, use_cache=False), expected)


def test_f61_threads_share_one_model_and_one_store(llama, memory_store, generate, record_property):
    prompts = [torch.cat([random_prompt(33, seed=1), random_prompt(5 + n, seed=n)], 1) for n in range(4)]
    expected = [generate(llama, prompt) for prompt in prompts]
    wrong = []

    def work(number):
        wrong.extend(number for _ in range(3) if not torch.equal(generate(llama, prompts[number]), expected[number]))

    with attach(llama, memory_store) as attached:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert len(attached.reports) == 12
    assert max(report.cached_tokens for report in attached.reports) >= 37
    record_property("trials", len(attached.reports))


def test_attach_ends_with_its_block(llama, memory_store, generate):
    with attach(llama, memory_store) as attached:
        generate(llama, random_prompt(20))
    generate(llama, random_prompt(20))
    assert len(attached.reports) == 1


def test_the_innermost_attachment_serves(llama, memory_store, tmp_path, generate):
    with (
        ghostcacher.open_store(tmp_path / "other", block_tokens=16) as inner_store,
        attach(llama, memory_store) as outer,
    ):
        with attach(llama, inner_store) as inner:
            generate(llama, random_prompt(20))
        generate(llama, random_prompt(20))
    assert (len(inner.reports), len(outer.reports)) == (1, 1)


def test_f63_a_copy_of_a_cache_goes_its_own_way(llama, store, generate):
    first = random_prompt(40, seed=1)
    cache = GhostCache(llama, store)
    out = generate(llama, first, cache)
    twin = copy.deepcopy(cache)
    left = torch.cat([out, random_prompt(5, seed=8)], 1)
    right = torch.cat([out, random_prompt(6, seed=9)], 1)
    assert torch.equal(generate(llama, left, cache), generate(llama, left))
    assert torch.equal(generate(llama, right, twin), generate(llama, right))


def test_f63_a_cache_is_not_pickled(llama, store):
    with pytest.raises(TypeError, match=r"GhostCache\(model\)"):
        pickle.dumps(GhostCache(llama, store))


def test_a_copy_of_the_model_is_another_model(store, generate):
    model = tiny_model("llama", seed=3)
    cache = GhostCache(model, store)
    prompt = random_prompt(40)
    generate(model, prompt, cache)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.add_(0.5)
        twin.model.embed_tokens.weight.add_(0.1)
    twin_cache = GhostCache(twin, store)
    assert torch.equal(generate(twin, prompt, twin_cache), generate(twin, prompt))
    assert twin_cache.report.cached_tokens == 0


def test_inference_mode_in_and_out(llama, store, generate):
    prompt = random_prompt(40, seed=1)
    expected = generate(llama, prompt)
    cache = GhostCache(llama, store)
    with torch.inference_mode():
        first = generate(llama, prompt, cache)
    longer = torch.cat([first.clone(), random_prompt(5, seed=2)], 1)
    assert torch.equal(first, expected)
    assert torch.equal(generate(llama, longer, cache), generate(llama, longer))


def test_f52_an_exception_inside_the_forward_leaves_a_usable_cache(llama, store, generate):
    class StopEarlyError(Exception):
        pass

    def fail(*_):
        raise StopEarlyError

    prompt = random_prompt(40, seed=1)
    cache = GhostCache(llama, store)
    handle = llama.model.layers[2].register_forward_hook(fail)
    with pytest.raises(StopEarlyError):
        generate(llama, prompt, cache)
    handle.remove()
    store.flush()
    assert not store.stats().tiers[0].blocks
    assert torch.equal(generate(llama, prompt, cache), generate(llama, prompt))


@pytest.mark.parametrize("failing_step", [3, 6])
def test_an_exception_in_a_decode_step_leaves_a_usable_cache(llama, store, generate, failing_step):
    class StopEarlyError(Exception):
        pass

    steps = []

    def fail(*_):
        steps.append(1)
        if len(steps) == failing_step:
            raise StopEarlyError

    prompt = random_prompt(40, seed=1)
    cache = GhostCache(llama, store)
    generate(llama, prompt, cache, new=1)
    original = llama.model.layers[2].forward
    llama.model.layers[2].forward = lambda *args, **kwargs: (fail(), original(*args, **kwargs))[1]
    with pytest.raises(StopEarlyError):
        generate(llama, prompt, cache)
    llama.model.layers[2].forward = original
    for second in (prompt, random_prompt(50, seed=2)):
        assert torch.equal(generate(llama, second, cache), generate(llama, second))
    store.flush()
    fresh = GhostCache(llama, store)
    assert torch.equal(generate(llama, prompt, fresh), generate(llama, prompt))


def test_a_reset_cache_never_stores_what_it_no_longer_holds(llama, store, generate):
    """As many columns as before, of something else: the old rows must be forgotten with the state."""
    prompt, other = random_prompt(40, seed=1), random_prompt(40, seed=2)
    cache = GhostCache(llama, store)
    generate(llama, prompt, cache)
    cache.reset()
    embeds = llama.get_input_embeddings()(other)
    llama.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(other), max_new_tokens=8, do_sample=False,
                   **{CallReader(llama).cache_name: cache})  # fmt: skip
    del cache
    gc.collect()
    store.flush()
    fresh = GhostCache(llama, store)
    out = generate(llama, prompt, fresh)
    assert torch.equal(out, generate(llama, prompt))
    longer = torch.cat([out, random_prompt(4, seed=3)], 1)
    assert torch.equal(generate(llama, longer, GhostCache(llama, store)), generate(llama, longer))


def test_a_prompt_after_a_bypassed_one_is_served(llama, store, generate):
    prompt = random_prompt(40, seed=1)
    cache = GhostCache(llama, store)
    generate(llama, prompt, cache)
    store.flush()
    generate(llama, prompt, cache, output_hidden_states=True, return_dict_in_generate=True)
    assert cache.report.reason.startswith("bypass")
    assert torch.equal(generate(llama, prompt, cache), generate(llama, prompt))
    assert cache.report.cached_tokens == 39


def test_f56_crop_and_row_selection_by_the_caller(llama, store, generate):
    prompt = random_prompt(40, seed=1)
    cache = GhostCache(llama, store)
    out = generate(llama, prompt, cache)
    cache.crop(-10)
    longer = torch.cat([out, random_prompt(4, seed=2)], 1)
    assert torch.equal(generate(llama, longer, cache), generate(llama, longer))
    cache.batch_select_indices(torch.tensor([0]))
    assert torch.equal(generate(llama, longer, cache), generate(llama, longer))
    cache.reset()
    assert torch.equal(generate(llama, longer, cache), generate(llama, longer))


def test_f57_what_is_stored_is_not_changed_by_what_comes_later(llama, memory_store, generate):
    prompt = random_prompt(40, seed=1)
    cache = GhostCache(llama, memory_store)
    out = generate(llama, prompt, cache)
    memory_store.flush()
    tier = memory_store.tiers[0]
    before = {key.digest: [t.clone() for t in tier.get(key).tensors] for key in tier.entries()}
    for layer in cache.layers:
        layer.keys.fill_(7.0)
        layer.values.fill_(7.0)
    generate(llama, torch.cat([out, random_prompt(5)], 1), GhostCache(llama, memory_store))
    for key in list(tier.entries()):
        if key.digest in before:
            assert all(torch.equal(a, b) for a, b in zip(tier.get(key).tensors, before[key.digest], strict=True))


def test_stock_caches_of_the_user_are_left_alone(llama, memory_store, generate):
    prompt = random_prompt(40, seed=1)
    stock = DynamicCache(config=llama.config)
    out = generate(llama, prompt, stock)
    longer = torch.cat([out, random_prompt(5)], 1)
    expected = generate(llama, longer)
    with attach(llama, memory_store) as attached:
        assert torch.equal(generate(llama, longer, stock), expected)
    assert attached.reports == []


def test_an_interrupted_prompt_of_a_users_own_cache_is_never_taken_for_another(llama, memory_store, generate):
    """Ctrl-C ends a forward without a word; what the cache then holds of a call that is not served is nobody's."""
    first, second = random_prompt(100, seed=1), random_prompt(100, seed=2)
    with ghostcacher.attach(llama, memory_store):
        cache = DynamicCache(config=llama.config)
        forward = llama.model.forward

        def interrupted(*_, **__):
            raise KeyboardInterrupt

        llama.model.forward = interrupted
        try:
            with pytest.raises(KeyboardInterrupt):
                generate(llama, first, cache, new=2)
        finally:
            llama.model.forward = forward
        with torch.no_grad():
            llama(second, past_key_values=cache)  # all logits: not served
        del cache
    memory_store.flush()
    again = GhostCache(llama, memory_store)
    assert torch.equal(generate(llama, first, again), generate(llama, first))


def test_a_length_asked_for_by_another_thread_changes_nothing(llama, memory_store, generate):
    prompt, cache = random_prompt(40, seed=1), GhostCache(llama, memory_store)
    name = "cache" if "cache" in inspect.signature(llama.forward).parameters else "past_key_values"
    expected = generate(llama, prompt, new=8)[0, 40:].tolist()
    ids, answer, forward = prompt, [], llama.model.forward

    def watched(*arguments, **given):
        watcher = threading.Thread(target=cache.get_seq_length)
        watcher.start()
        watcher.join()
        return forward(*arguments, **given)

    try:
        for step in range(8):
            llama.model.forward = watched if step == 5 else forward
            with torch.no_grad():
                ids = llama(ids, **{name: cache}, logits_to_keep=1).logits[:, -1:].argmax(-1)
            answer.append(int(ids))
    finally:
        llama.model.forward = forward
    assert answer == expected


def test_threads_that_identify_a_model_whose_weights_change_never_mix_them(generate, memory_store, monkeypatch):
    model, other = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    prompt, results = random_prompt(100, seed=3), []
    GhostCache(model, memory_store)
    generate(model, prompt, GhostCache(model, memory_store))
    memory_store.flush()
    fields = base.identity_fields
    monkeypatch.setattr(base, "identity_fields", lambda *a, **k: (time.sleep(0.3), fields(*a, **k))[1])
    model.load_state_dict(other.state_dict())
    caches = [GhostCache(model, memory_store) for _ in range(2)]
    threads = [
        threading.Thread(target=lambda cache=cache: results.append(generate(model, prompt, cache))) for cache in caches
    ]
    for thread in threads:
        thread.start()
        time.sleep(0.15)
    for thread in threads:
        thread.join()
    expected = generate(other, prompt)
    assert all(torch.equal(result, expected) for result in results)
    assert {cache.report.cached_tokens for cache in caches} <= {0, 99}
