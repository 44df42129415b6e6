"""What went wrong at other caches of attention state, by their public reports: the same situations here.

One test each, numbered as in docs/reliability.md, which links the reports. All compare with a cold run of the same
prompt: tokens, and logits where the report was of state that is silently wrong.
"""

from __future__ import annotations

import itertools
import os
import threading

import pytest
import torch

import ghostcacher
from ghostcacher import GhostCache, serving
from ghostcacher.adapters.landing import Landing
from ghostcacher.adapters.media import _media_ids
from ghostcacher.errors import StoreError
from ghostcacher.index import PrefixIndex
from ghostcacher.stores.directory import DirectoryStore
from ghostcacher.testing.images import IMAGE_START, image_inputs, random_image, tiny_image_model
from ghostcacher.testing.models import random_prompt, tiny_model

PROMPT = random_prompt(100, seed=3)
PEFT = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.is_gradient_checkpointing.:FutureWarning")


def opened(directory, **options):
    return ghostcacher.open_store(directory, block_tokens=16, **{"memory": None, **options})


def close(found, expected):
    """Tokens and logits of two runs."""
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], atol=1e-4, rtol=0)


@pytest.fixture
def ask(with_logits):
    """One prompt through a store, against a cold run; gives the report. What is new is stored when it returns."""

    def run(model, store, ids=PROMPT, **options):
        cache = GhostCache(model, store)
        close(with_logits(model, ids, cache, **options), with_logits(model, ids, **options))
        store.flush()
        return cache.report

    return run


def test_p01_reading_what_is_being_written_and_deleted(models, generate, tmp_path):
    model, other = models("llama"), tiny_model("llama")
    prompts = [random_prompt(64, seed=seed) for seed in range(3)]
    expected = [generate(model, ids, new=2) for ids in prompts]
    ends = threading.Event()

    def write():
        with opened(tmp_path) as store:
            for number in itertools.cycle(range(3)):
                if ends.is_set():
                    break
                generate(other, prompts[number], GhostCache(other, store), new=1)
                store.flush()
                ghostcacher.forget(other, prompts[(number + 1) % 3][0].tolist(), store)

    writer = threading.Thread(target=write)
    writer.start()
    found = []
    try:
        for turn in range(45):
            with opened(tmp_path, role="reader") as store:
                cache = GhostCache(model, store)
                assert torch.equal(generate(model, prompts[turn % 3], cache, new=2), expected[turn % 3])
                found.append(cache.report.cached_tokens)
    finally:
        ends.set()
        writer.join()
    assert max(found) > 0


@PEFT
def test_p02_adapters_of_one_name_and_other_weights(ask, tmp_path):
    peft = pytest.importorskip("peft", reason="`make test` installs peft")

    def adapted(seed):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return peft.get_peft_model(tiny_model("llama"), config, adapter_name="assistant").eval()

    one, two = adapted(1), adapted(2)
    with opened(tmp_path) as store:
        assert [ask(model, store).cached_tokens for model in (one, two, one, two)] == [0, 0, 99, 99]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("none left"), MemoryError(), RuntimeError("cudaErrorMemory")])
def test_p03_memory_that_ends_in_the_middle_of_a_prefix(models, ask, tmp_path, monkeypatch, error):
    model, place = models("llama"), Landing.place
    with opened(tmp_path) as store:
        ask(model, store)
        for fails_at in range(6):
            calls = itertools.count()

            def failing(landing, block, calls=calls, fails_at=fails_at):
                if next(calls) == fails_at:
                    raise error
                place(landing, block)

            with monkeypatch.context() as patch:
                patch.setattr(Landing, "place", failing)
                assert ask(model, store).cached_tokens < 99
        assert ask(model, store).cached_tokens == 99


def test_p04_one_model_in_several_dtypes(ask, generate, tmp_path):
    models = [tiny_model("llama", dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    for number, (first, second) in enumerate(itertools.permutations(models, 2)):
        with opened(tmp_path / str(number)) as store:
            ask(first, store)
            cache = GhostCache(second, store)
            assert torch.equal(generate(second, PROMPT, cache), generate(second, PROMPT))
            assert cache.report.cached_tokens == 0
            assert ghostcacher.lookup(first, PROMPT[0].tolist(), store).tokens == 99


@pytest.mark.parametrize("codec", ["int8", "int4", "ec(0.25)"])
def test_p04_state_that_was_stored_in_fewer_bits(models, ask, generate, tmp_path, codec):
    model = models("llama")
    with opened(tmp_path, codec=codec) as coarse:
        generate(model, PROMPT, GhostCache(model, coarse), new=1)
        coarse.flush()
        assert coarse.stats().tiers[0].blocks > 0
    with opened(tmp_path) as exact:
        assert ask(model, exact).cached_tokens == 0


@pytest.mark.parametrize("tiers", [
    {"memory": "8MiB", "disk": None}, {"disk": "1GiB"}, {"disk": None, "remote": "memory://alone"},
    {"memory": "8MiB", "disk": "1GiB", "remote": "memory://beside"},
])  # fmt: skip
def test_p05_p17_a_salt_holds_in_every_tier(models, ask, tmp_path, tiers):
    """And with a salt that is another one's prefix, an empty one, or the name of an adapter or of the model."""
    model = models("llama")
    salts = ["tenant", "tenant ", "", "tenant\0", "llama", "assistant"]
    for salt in salts:
        with opened(tmp_path, salt=salt, **tiers) as store:
            assert ask(model, store).cached_tokens == 0, salt
            assert ask(model, store).cached_tokens == 99
            assert sum(tier.hits for tier in store.stats().tiers) == 7


def test_p06_embeddings_in_place_of_tokens(models, ask, tmp_path):
    model = models("llama")
    embedded = model.get_input_embeddings()(PROMPT).detach()
    other = embedded.clone()
    other[:, 20:60] += 1.0
    with opened(tmp_path) as store:
        ask(model, store)
        for given in (embedded, other):
            options = {"inputs_embeds": given, "attention_mask": torch.ones_like(PROMPT), "max_new_tokens": 4}
            cold = model.generate(do_sample=False, **options)
            cache = GhostCache(model, store)
            assert torch.equal(model.generate(do_sample=False, past_key_values=cache, **options), cold)
            assert cache.report.cached_tokens == 0
            store.flush()
            assert ask(model, store).cached_tokens == 99


@pytest.mark.parametrize("at", ["fsync", "link", "rename", "write"])
def test_p07_what_could_not_be_stored_is_not_there(models, ask, tmp_path, monkeypatch, at):
    model, calls = models("llama"), itertools.count()
    genuine = getattr(os, at)

    def failing(*given, **options):
        if next(calls) % 3:
            raise OSError(5, "Input/output error")
        return genuine(*given, **options)

    with opened(tmp_path) as store:
        with monkeypatch.context() as patch:
            patch.setattr(os, at, failing)
            ask(model, store)
            held = sum(tier.blocks for tier in store.stats().tiers)
        whole = [path for path in tmp_path.rglob("*.safetensors") if path.stat().st_size]
        assert len(whole) == held
        known = ghostcacher.lookup(model, PROMPT[0].tolist(), store).tokens
        assert ask(model, store).cached_tokens == min(known, 99)
    with opened(tmp_path) as store:
        assert ask(model, store).cached_tokens == 99


def test_p08_many_conversations_paged_to_disk_keep_apart(models, ask, tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "worth_tokens", lambda legs, *_: legs[-1].end_tokens if legs else 0)
    model, opening = models("llama"), random_prompt(32, seed=9)
    talks = [torch.cat([opening, random_prompt(70, seed=seed)], dim=1) for seed in range(20, 32)]
    with opened(tmp_path, memory="100KiB", disk="1GiB") as store:
        for ids in talks:
            ask(model, store, ids, new=2)
        assert store.stats().tiers[0].evicted > 0
        for ids in reversed(talks):
            assert ask(model, store, ids, new=2).cached_tokens == 101


@pytest.mark.parametrize("recipe", ["qwen3_next", "falcon_h1", "mamba2", "lfm2"])
def test_p09_p18_recurrent_state_behind_a_shared_beginning_and_after_a_restart(recipe, models, ask, tmp_path):
    model, opening = models(recipe), random_prompt(64, seed=1)
    prompts = [torch.cat([opening, random_prompt(30, seed=seed)], dim=1) for seed in range(2, 5)]
    for turn in range(2):
        for ids in prompts:
            with opened(tmp_path) as store:
                cached = ask(model, store, ids).cached_tokens
                assert turn == 0 or cached > 0


@pytest.mark.parametrize("recipe", ["gemma2", "gemma3_text", "mistral", "cohere2"])
def test_p10_windows_that_slid_away_from_the_beginning(recipe, models, ask, tmp_path):
    """One prompt longer than the window, four times; then others that part from it inside and outside of the window."""
    model = models(recipe)
    whole = random_prompt(120, seed=5)
    with opened(tmp_path) as store:
        assert [ask(model, store, whole).cached_tokens for _ in range(4)] == [0, 119, 119, 119]
        for shared in (8, 40, 64, 100, 119):
            other = torch.cat([whole[:, :shared], random_prompt(30, seed=shared)], dim=1)
            assert ask(model, store, other).cached_tokens <= shared


@pytest.mark.parametrize("length", [99, 96, 80, 17, 16, 2, 1])
def test_p11_a_prompt_that_is_the_beginning_of_a_stored_one(models, ask, tmp_path, length):
    model = models("llama")
    with opened(tmp_path) as store:
        ask(model, store)
        assert ask(model, store, PROMPT[:, :length]).cached_tokens <= length - 1


@pytest.mark.parametrize("fails_at", range(7))
@pytest.mark.parametrize("recipe", ["llama", "gemma2"])
def test_p12_a_load_that_fails_after_it_was_promised(recipe, models, ask, tmp_path, monkeypatch, fails_at):
    model, get_many, calls = models(recipe), DirectoryStore.get_many, itertools.count()

    def failing(store, keys, **options):
        found = dict(get_many(store, keys, **options))
        return {key: StoreError("it went away") if next(calls) >= fails_at else value for key, value in found.items()}

    with opened(tmp_path) as store:
        ask(model, store)
        with monkeypatch.context() as patch:
            patch.setattr(DirectoryStore, "get_many", failing)
            assert ask(model, store).cached_tokens < 99
        assert next(calls) > fails_at
        assert ask(model, store).cached_tokens == 99


def test_p13_an_eviction_that_fails_once_does_not_end_eviction(models, ask, tmp_path, monkeypatch):
    model, victims, calls = models("llama"), PrefixIndex.victims, itertools.count()

    def failing(index, *given, **options):
        if next(calls) == 0:
            raise ValueError("no salt was given")
        return victims(index, *given, **options)

    monkeypatch.setattr(PrefixIndex, "victims", failing)
    with opened(tmp_path, disk="200KiB") as store:
        for seed in range(12):
            ask(model, store, random_prompt(64, seed=seed), new=1)
        tier = store.stats().tiers[0]
        assert next(calls) > 1
        assert tier.evicted > 0
        assert 0 < tier.size_bytes <= tier.budget_bytes


def test_p14_what_a_caller_does_to_a_cache_is_not_done_to_the_store(models, ask, generate):
    model = models("llama")
    with ghostcacher.open_store(memory="64MiB", disk=None, block_tokens=16) as store:
        ask(model, store)
        for _ in range(3):
            cache = GhostCache(model, store)
            generate(model, PROMPT, cache, new=40)
            assert cache.report.cached_tokens == 99
            store.flush()
            for layer in cache.layers:
                layer.keys.fill_(7.0)
                layer.values.zero_()
            assert ask(model, store).cached_tokens == 99


@pytest.mark.parametrize("recipe", ["llama", "gpt_neox", "deepseek_v3", "gemma2", "qwen3_next"])
def test_p15_the_same_prompt_four_times(recipe, models, with_logits, tmp_path):
    """Not one after the other like the cold run alone: all warm ones to the last bit alike."""
    model = models(recipe)
    expected, found = with_logits(model, PROMPT), []
    with opened(tmp_path) as store:
        for _ in range(4):
            found.append(with_logits(model, PROMPT, GhostCache(model, store)))
            store.flush()
    for each in found:
        close(each, expected)
    assert all(torch.equal(each[1], found[1][1]) for each in found[1:])


def test_p16_images_whose_digests_end_alike(tmp_path):
    """16 bits of a digest for an image were one in 65,536; here it is 30 for each of its tokens."""
    digests = [number.to_bytes(30, "big") + b"\xab\xcd" for number in range(20_000)]
    assert len({tuple(_media_ids(digest, 4)) for digest in digests}) == len(digests)
    model = tiny_image_model("llava")
    prompts = [[*range(2, 23), IMAGE_START, random_image(seed), *range(30, 50)] for seed in range(4)]

    def run(prompt, cache=None):
        given = {} if cache is None else {"past_key_values": cache}
        return model.generate(**image_inputs(model, [prompt]), max_new_tokens=4, do_sample=False, **given)

    with opened(tmp_path) as store:
        for _ in range(2):
            for prompt in prompts:
                cache = GhostCache(model, store)
                assert torch.equal(run(prompt, cache), run(prompt))
                store.flush()
        assert cache.report.cached_tokens > len(range(2, 23)) + 1


@PEFT
def test_p17_a_salt_that_is_an_adapters_name(ask, tmp_path):
    peft = pytest.importorskip("peft", reason="`make test` installs peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("llama"), config, adapter_name="assistant").eval()
    with opened(tmp_path) as store:
        ask(model, store)
    with opened(tmp_path, salt="assistant") as store:
        assert ask(model, store).cached_tokens == 0
        with model.disable_adapter():
            assert ask(model, store).cached_tokens == 0
    with opened(tmp_path) as store, model.disable_adapter():
        assert ask(model, store).cached_tokens == 0


def test_p20_weights_updated_in_place_and_back(ask, tmp_path):
    model = tiny_model("llama")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with opened(tmp_path) as store:
        assert [ask(model, store).cached_tokens for _ in range(2)] == [0, 99]
        with torch.no_grad():
            model.model.layers[1].self_attn.v_proj.weight.add_(0.05)
        assert [ask(model, store).cached_tokens for _ in range(2)] == [0, 99]
        model.load_state_dict(before)
        assert ask(model, store).cached_tokens == 99
